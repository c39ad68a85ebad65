"""Which backend a GPU gets, by what it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastpo.ops.rows import architecture, cuda, registry, triton

GPU = torch.device("cuda", 0)


@pytest.fixture(params=[(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def capability(request, monkeypatch):
    """A GPU, and an extension that was built for GPUs."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    monkeypatch.setattr(cuda, "_C", SimpleNamespace(has_cuda=True))
    return request.param


def test_a_gpu_older_than_the_code_gets_plain_pytorch(capability):
    assert registry.choose(None, GPU) == ("triton" if capability >= (8, 0) else "torch")
    for name in ("triton", "cuda"):
        if capability >= (8, 0):
            assert registry.choose(name, GPU) == name
        else:
            got = "{}.{}".format(*capability)
            message = f"backend '{name}': needs compute capability 8.0 or newer, got {got}"
            with pytest.raises(RuntimeError, match=message):
                registry.choose(name, GPU)


def test_a_gpu_that_is_not_there_is_said(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="backend 'cuda': no CUDA device is there"):
        registry.choose("cuda", GPU)


def test_only_code_for_hopper_is_hoppers_own(capability):
    found = architecture.is_hopper(GPU)
    assert found == (capability == (9, 0))
    assert not architecture.is_hopper(torch.device("cpu"))


def test_a_gpu_without_triton_has_kernels_of_each_kind(capability, monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    chosen = registry.choose(None, GPU)
    assert chosen == ("cuda" if capability >= (8, 0) else "torch")
    kinds = registry.kernels(chosen), registry.pair_kernels(chosen), registry.word_kernels(chosen)
    assert not any("triton" in kind.__name__ for kind in kinds)

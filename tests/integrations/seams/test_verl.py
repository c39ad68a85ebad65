"""verl's fused heads on fastpo's: its own modules where it is installed, else the same in shape."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import _processes
import pytest
import torch
import torch.distributed as dist

import fastpo
from fastpo.integrations import verl
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.integrations.seams.saying import say_once
from fastpo.ops.shards.gathered import HeadOptions
from fastpo.testing import assert_as_good_as_eager

N, H, V = 9, 16, 40
KERNEL = """
import torch

class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ):
        return "its own", reduction

linear_cross_entropy = LinearCrossEntropy.apply
"""
CHUNKS = """
import torch

class FusedLinearForPPOFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, vocab_weights, input_ids, temperature=1.0, chunk_size=512):
        return "its own"

class FusedLinearForPPO(torch.nn.Module):
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        ids = input_ids.to(torch.int64)
        return FusedLinearForPPOFunction.apply(hidden_states, vocab_weights, ids, temperature, 512)
"""
LOGPS = """
def logprobs_from_logits(logits, labels, inplace_backward=True):
    return logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
"""
MODULES = {
    "utils/kernel/linear_cross_entropy.py": KERNEL,
    "utils/experimental/torch_functional.py": CHUNKS,
    "utils/torch_functional.py": LOGPS,
}


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """The seams wait for verl, which is not imported yet."""
    if find_spec("verl") is None:
        for name, code in MODULES.items():
            file = tmp_path / "verl" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
    say_once.cache_clear()
    verl.install(HeadOptions())
    yield
    verl.remove()
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        del sys.modules[name]


def module(name):
    return importlib.import_module(f"verl.utils.{name}")


def problem(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(N, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    labels = torch.randint(0, V, (N,))
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight)), labels


def eager(hidden, weight, labels, temperature):
    logits = hidden @ weight.t() / temperature
    logps = logits.log_softmax(-1)
    return logps.gather(-1, labels[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def results(read, dtype=torch.float32):
    hidden, weight, labels = problem(dtype)
    logps, entropy = read(hidden, weight, labels, 0.7)
    grads = torch.autograd.grad((logps * 2 + entropy.to(logps.dtype)).sum(), (hidden, weight))
    return [logps.detach(), entropy.detach(), *grads]


def chunked(hidden, weight, labels, temperature):
    head = module("experimental.torch_functional").FusedLinearForPPO()
    logps, entropy = head(hidden[None], weight, labels[None].int(), temperature)
    assert logps.shape == entropy.shape == (1, N)
    return logps[0], entropy[0]


def by_kernels(hidden, weight, labels, temperature):
    return module("kernel.linear_cross_entropy").linear_cross_entropy(
        hidden[None], weight, labels[None], temperature, "none"
    )


@pytest.mark.parametrize("read", [chunked, by_kernels])
def test_log_probabilities_and_entropies(read):
    truth, own = results(eager, torch.float64), results(eager)
    for name, ours, theirs, exact in zip("lehw", results(read), own, truth, strict=True):
        assert_as_good_as_eager(name, ours, theirs, exact)


def test_entropies_keep_their_dtype():
    hidden, weight, labels = problem(torch.bfloat16)
    logps, entropy = chunked(hidden, weight, labels, 1.0)
    assert (logps.dtype, entropy.dtype) == (torch.float32, torch.bfloat16)
    logps, entropy = by_kernels(hidden, weight, labels, 1.0)
    assert (logps.dtype, entropy.dtype) == (torch.float32, torch.float32)


def test_log_probabilities_of_lazy_logits():
    hidden, weight, labels = problem()
    head = torch.nn.Linear(H, V, bias=False)
    head.weight = torch.nn.Parameter(weight.detach())
    lazy = promised(Promise.of(head, hidden))
    read = module("torch_functional").logprobs_from_logits
    torch.testing.assert_close(read(lazy, labels), read(head(hidden), labels))
    assert lazy._cell.values is None


def test_what_is_not_served_stays_verls_own(caplog):
    if find_spec("verl").origin is not None:
        pytest.skip("its kernels need a GPU")
    hidden, weight, labels = problem()
    read = module("kernel.linear_cross_entropy").linear_cross_entropy
    assert read(hidden, weight, labels, 1.0, "sum") == ("its own", "sum")
    assert "verl keeps its own head: reduction=sum" in caplog.text
    verl.remove()
    assert read(hidden, weight, labels, 1.0, "none")[0].shape == (N,), "a name bound before"
    assert module("kernel.linear_cross_entropy").linear_cross_entropy(
        hidden, weight, labels, 1.0, "none"
    ) == ("its own", "none")


def test_another_signature_is_left_alone(caplog, monkeypatch, tmp_path):
    verl.remove()
    functional = module("torch_functional")
    monkeypatch.setattr(functional, "logprobs_from_logits", lambda logits: logits)
    verl.install(HeadOptions())
    assert functional.logprobs_from_logits("x") == "x"
    assert (
        "verl keeps its own head: verl.utils.torch_functional.logprobs_from_logits" in caplog.text
    )


def test_the_patch_brings_it():
    pytest.importorskip("trl")
    verl.remove()
    own = module("experimental.torch_functional").FusedLinearForPPOFunction
    with fastpo.patched():
        assert module("experimental.torch_functional").FusedLinearForPPOFunction is not own
    assert module("experimental.torch_functional").FusedLinearForPPOFunction is own


def parallel(rank, folder):
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    hidden, weight, labels = problem()
    part = weight.detach().chunk(size)[rank].clone().requires_grad_()
    kernels = verl._Kernels(None, HeadOptions())
    logps, entropy = kernels(hidden, part, labels, 0.7, "none", dist.group.WORLD)
    (2 * logps + entropy).sum().backward()
    dist.all_reduce(hidden.grad)  # as leaving a region of spread sequences does
    torch.save([logps.detach(), entropy.detach(), hidden.grad, part.grad], folder / f"{rank}.pt")


def test_a_tensor_parallel_head(tmp_path):
    _processes.run(parallel, tmp_path)
    found = _processes.loaded(tmp_path)
    expected = results(eager)
    for mine in found:
        torch.testing.assert_close(mine[:3], expected[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([mine[3] for mine in found]), expected[3], rtol=1e-5, atol=1e-5
    )

"""Weights as compressed-tensors stores them, told to `fastpo` by their stored tensors."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (make quantised)")

import fastpo
from fastpo.ops.tiles.tiled import tiled

V, H = 96, 64


def stored(kind: str, dtype: torch.dtype, **arguments: Any) -> tuple[dict[str, Tensor], Tensor]:
    """What its compressor makes of a weight, and what it makes of that again."""
    quantization = import_module("compressed_tensors.quantization")
    compressors = import_module("compressed_tensors.compressors")
    weights = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    layer = torch.nn.Linear(H, V, bias=False, dtype=dtype)
    quantization.initialize_module_for_quantization(layer, scheme)
    torch.manual_seed(0)
    for name, x in layer.named_parameters():
        if name == "weight":
            torch.nn.init.normal_(x, std=0.3)
        elif name == "weight_global_scale":
            x.data.fill_(37.0)
        elif name == "weight_scale":
            x.data.uniform_(0.01, 0.1).mul_(37.0 if kind.startswith("nvfp4") else 1.0)
        elif name == "weight_zero_point" and x.dtype == torch.int8:
            x.data.random_(-3, 4)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    found = compressor.compress({n: p.data for n, p in layer.named_parameters()}, scheme)
    return found, compressor.decompress(found, scheme)["weight"]


def same(source: Any, weight: Tensor) -> bool:
    words = tiled(source)
    return torch.equal(words.whole(), weight) and torch.equal(words[37:61], weight[37:61])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_by_words_and_blocks(dtype):
    facts = {"num_bits": 8, "type": "float"}
    found, weight = stored("float-quantized", dtype, strategy="channel", **facts)
    assert same(fastpo.BlockScaled(found["weight"], found["weight_scale"], (1, H), dtype), weight)
    found, weight = stored(
        "float-quantized", dtype, strategy="block", block_structure=[32, 16], **facts
    )
    blocks = fastpo.BlockScaled(found["weight"], found["weight_scale"], (32, 16), dtype)
    assert same(blocks, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_packed_integers(bits, symmetric, dtype):
    facts = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16}
    found, weight = stored("pack-quantized", dtype, symmetric=symmetric, **facts)
    points = None
    if not symmetric:
        helpers = import_module("compressed_tensors.compressors.pack_quantized.helpers")
        shape = (V, H // 16)
        points = helpers.unpack_from_int32(found["weight_zero_point"], bits, shape, packed_dim=0)
    parts = found["weight_packed"], found["weight_scale"], bits, H, points
    assert same(fastpo.PackedIntegers(*parts, dtype), weight)


def test_nvfp4():
    facts = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    found, weight = stored("nvfp4-pack-quantized", torch.float32, **facts)
    scale = 1 / found["weight_global_scale"]
    source = fastpo.NVFP4(found["weight_packed"], found["weight_scale"], scale, torch.float32)
    torch.testing.assert_close(tiled(source).whole(), weight.float(), rtol=2**-7, atol=0)

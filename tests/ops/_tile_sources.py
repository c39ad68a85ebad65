"""Tile sources, and the weights they stand for, made in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastpo
from fastpo import TileSource

V, H = 2503, 48  # more than one tile of 2,048 words


@dataclass
class Sliced:
    """A tensor, and which tiles were asked for."""

    weight: Tensor
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def tile(self, v0: int, v1: int) -> Tensor:
        self.asked.append((v0, v1))
        return self.weight[v0:v1]


def sliced(dtype: torch.dtype) -> tuple[TileSource, Tensor]:
    weight = _draw(V, H).to(dtype) / 4
    return Sliced(weight), weight


def float8_blocks(dtype: torch.dtype) -> tuple[TileSource, Tensor]:
    """128 words and 32 columns share a scale; neither V nor H is a multiple."""
    values, scales = (_draw(V, H) * 20).to(torch.float8_e4m3fn), _draw(20, 2).abs() / 40
    every = torch.kron(scales, torch.ones(128, 32))[:V, :H]
    made = fastpo.BlockScaled(values, scales, (128, 32), dtype)
    return made, (values.double() * every.double()).float().to(dtype)


def int8_words(dtype: torch.dtype) -> tuple[TileSource, Tensor]:
    values, scales = (_draw(V, H) * 40).clamp(-127, 127).to(torch.int8), _draw(V, 1).abs() / 80
    made = fastpo.BlockScaled(values, scales, (1, H), dtype)
    return made, (values.double() * scales.double()).float().to(dtype)


def one_scale(dtype: torch.dtype) -> tuple[TileSource, Tensor]:
    values = (_draw(V, H) * 20).to(torch.float8_e5m2)
    made = fastpo.BlockScaled(values, torch.full((1, 1), 0.01), (128, 32), dtype)
    return made, (values.double() * torch.tensor(0.01).double()).float().to(dtype)


def nvfp4(dtype: torch.dtype) -> tuple[TileSource, Tensor]:
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(numbers + [-x for x in numbers])
    codes = torch.randint(0, 16, (V, H), generator=torch.Generator().manual_seed(3))
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    scales = (_draw(V, H // 16).abs() * 9).to(torch.float8_e4m3fn)
    scale = torch.tensor(33 / 4096)  # of more digits than 16 bits have beside the blocks' own
    every = scales.double().repeat_interleave(16, 1) * scale
    made = fastpo.NVFP4(packed, scales, scale, dtype)
    return made, (table[codes].double() * every).float().to(dtype)


def packed_integers(dtype: torch.dtype, bits: int = 4) -> tuple[TileSource, Tensor]:
    """Integers and zero points; 24 numbers share a scale."""
    g = torch.Generator().manual_seed(3)
    codes, points = (torch.randint(0, 2**bits, (V, n), generator=g) for n in (H, 2))
    shifted = codes.view(V, -1, 32 // bits) << torch.arange(0, 32, bits)
    packed = torch.where(shifted.sum(-1) >= 2**31, shifted.sum(-1) - 2**32, shifted.sum(-1))
    scales, middle = _draw(V, 2).abs() / 2**bits, 2 ** (bits - 1)
    made = fastpo.PackedIntegers(packed.to(torch.int32), scales, bits, H, points - middle, dtype)
    whole = (codes - points.repeat_interleave(24, 1)).double()
    return made, (whole * scales.repeat_interleave(24, 1).double()).float().to(dtype)


def packed_bytes(dtype: torch.dtype) -> tuple[TileSource, Tensor]:
    return packed_integers(dtype, 8)


_ALL = (sliced, float8_blocks, int8_words, one_scale, nvfp4, packed_integers, packed_bytes)
SOURCES: dict[str, Callable[[torch.dtype], tuple[TileSource, Tensor]]] = {
    made.__name__: made for made in _ALL
}


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

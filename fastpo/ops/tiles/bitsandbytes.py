"""Weights as bitsandbytes keeps them. Its operators are there where such a weight is."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FourBit:
    """`Params4bit`: NF4 or FP4, a scale for each block of the flat weight, perhaps quantised, too.

    The numbers `Linear4bit` multiplies by: dequantised into the dtype of its products at once.
    """

    stored: Tensor  # two words' numbers a byte, the upper four bits first
    state: Any  # bitsandbytes' QuantState
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.state.shape)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def tile(self, v0: int, v1: int) -> Tensor:
        H, size = self.shape[1], self.state.blocksize
        # Blocks may reach from one word into the next.
        first, last = v0 * H // size, -(-v1 * H // size)
        count = min(last * size, prod(self.shape)) - first * size
        packed = self.stored.detach().view(-1).view(torch.uint8)[first * size // 2 :]
        # As one row: the kernel for AVX-512 (0.50.2) is wrong where a row ends inside a block.
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed[: -(-count // 2)].unsqueeze(1),
            self._scales(first, last),
            size,
            self.state.quant_type,
            (1, count),
            self.dtype,
        )
        return flat.view(-1)[v0 * H - first * size :][: (v1 - v0) * H].view(v1 - v0, H)

    def _scales(self, first: int, last: int) -> Tensor:
        """Of blocks [first, last), float32."""
        state = self.state
        if not state.nested:
            return state.absmax[first:last]
        size = state.state2.blocksize
        outer = slice(first // size, -(-last // size))
        start = outer.start * size
        found = torch.ops.bitsandbytes.dequantize_blockwise.default(
            state.absmax[start : outer.stop * size],
            state.state2.absmax[outer],
            state.state2.code,
            size,
            torch.float32,
        )
        return (found + state.offset)[first - start : last - start]


@dataclass(frozen=True, eq=False)
class EightBit:
    """`Int8Params`: int8, a scale for each word; in the dtype of the hidden states, as LLM.int8 has
    it where it does not round these, too."""

    stored: Tensor  # [V, H] int8
    scales: Tensor  # [V] float32, the largest number of each word
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def tile(self, v0: int, v1: int) -> Tensor:
        words = self.stored.detach()[v0:v1].to(self.dtype)
        return words.mul_(self.scales[v0:v1].unsqueeze(1).mul(1.0 / 127.0))

"""Words that count in each row alone: the others are as good as -inf."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BITS = 8


@dataclass(frozen=True)
class WordMask:
    """bits [N, ⌈V/8⌉] uint8: word v counts where bit v % 8 of byte v // 8 is set.

    counts: [N] int64, how many words of the whole vocabulary do.  first: of the weight's words.
    """

    bits: Tensor
    counts: Tensor
    first: int = 0

    def select(self, rows: Tensor) -> WordMask:
        bits, counts = (x.index_select(0, rows) for x in (self.bits, self.counts))
        return replace(self, bits=bits, counts=counts)

    def allowed(self, a: int, b: int, v0: int, v1: int) -> Tensor:  # [b - a, v1 - v0] bool
        """Of rows a to b and words v0 to v1 of the weight."""
        v0, v1 = v0 + self.first, v1 + self.first
        start = v0 // _BITS
        octets = self.bits[a:b, start : -(-v1 // _BITS)]
        return unpacked(octets)[:, v0 - start * _BITS : v1 - start * _BITS]


def packed(allowed: Tensor) -> Tensor:  # [n, ⌈V/8⌉] uint8 of [n, V] bool
    n, words = allowed.shape
    octets = allowed.new_zeros(n, -(-words // _BITS) * _BITS)
    octets[:, :words] = allowed
    found = torch.zeros(n, octets.shape[1] // _BITS, dtype=torch.uint8, device=allowed.device)
    for bit in range(_BITS):
        found |= octets[:, bit::_BITS].to(torch.uint8) << bit
    return found


def unpacked(octets: Tensor) -> Tensor:  # [n, 8·bytes] bool
    found = torch.empty(*octets.shape, _BITS, dtype=torch.bool, device=octets.device)
    for bit in range(_BITS):
        found[..., bit] = (octets >> bit) & 1
    return found.flatten(-2)

"""Weights as torchao keeps them: tensors of its own, which can be sliced by words."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Subclass:
    """A slice of the weight, dequantised. torchao's own products may scale their result instead."""

    weight: Any  # [V, H], a TorchAOBaseTensor
    dtype: torch.dtype

    @property
    def stored(self) -> Tensor:
        found: Tensor = self.weight.qdata
        return found

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def tile(self, v0: int, v1: int) -> Tensor:
        # Words that share scales are cut together.
        rows = 1 if self.weight.scale.numel() == 1 else self.weight.block_size[0]
        start, stop = v0 // rows * rows, min(-(-v1 // rows) * rows, self.shape[0])
        found = self._dequantised(self.weight[start:stop])
        return found[v0 - start : v1 - start]

    def _dequantised(self, words: Any) -> Tensor:
        if "output_dtype" in inspect.signature(words.dequantize).parameters:
            found: Tensor = words.dequantize(output_dtype=self.dtype)
            return found
        return words.dequantize().to(self.dtype)

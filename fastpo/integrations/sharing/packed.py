"""What stands in the mask's place while a layout is active: how its rows attend.

The queries of a row are the tokens it owns, its keys the whole row. Row by row, or all at once
where a kernel takes sequences of different lengths.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from ...layout.tree import Layout, Row

Function = Callable[..., Any]
_WIDEST = 256  # head size of flash kernels


@dataclass(frozen=True, eq=False)
class Packed:
    layout: Layout

    def attend(
        self,
        attention: Function,  # transformers'
        module: nn.Module,
        query: Tensor,  # [1, heads, S, D]
        key: Tensor,  # [1, key heads, S, D]
        value: Tensor,  # [1, key heads, S, D']
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # [1, S, heads, D']
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Rows(Packed):
    """One call for each row."""

    mask: Function  # of the tokens a row shares and owns; None where it is causal
    made: dict[Any, Any] = field(default_factory=dict)

    def attend(
        self,
        attention: Function,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layout = self.layout
        keys, values = (layout.keys(x, 2).split(layout.lengths, 2) for x in (key, value))
        masks = [self._masked(row, query.dtype) for row in layout.rows]
        rows = zip(query.split(layout.owned, 2), keys, values, masks, strict=True)
        return torch.cat([attention(module, *row, *args, **kwargs)[0] for row in rows], 1), None

    def _masked(self, row: Row, dtype: torch.dtype) -> Any:
        """Part of the mask of the row that owns most behind as many: one for all layers."""
        key = row.shared, dtype
        if key not in self.made:
            most = max(r.owned for r in self.layout.rows if r.shared == row.shared)
            mask = self.mask(row.shared, most)
            if isinstance(mask, Tensor) and mask.dtype == torch.bool:
                # Attention would convert it in every layer, and keep each copy for the backward.
                floats = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                mask = floats.masked_fill_(~mask, torch.finfo(dtype).min)
            self.made[key] = mask
        mask = self.made[key]
        return mask if mask is None else mask[..., : row.owned, : row.length]


@dataclass(frozen=True, eq=False)
class Sdpa(Rows):
    """All rows at once in 16 bits on a GPU, where torch has a kernel for it; else row by row."""

    rule: Function | None = None  # of transformers: whether a query sees a key
    size: int | None = None  # of the layer's window

    def attend(
        self,
        attention: Function,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        kernel = _varlen_attn() if _fits_varlen(query, value, kwargs) else None
        window = self.window
        if args or kernel is None or window is None:
            return super().attend(attention, module, query, key, value, *args, **kwargs)
        sequences = self.layout.sequences
        keys, values = (self.layout.keys(x, 2) for x in (key, value))
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, keys, values))
        out = kernel(
            q,
            k,
            v,
            *sequences,
            scale=kwargs.get("scaling"),
            window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.unsqueeze(0), None

    @cached_property
    def window(self) -> tuple[int, int] | None:
        """Tokens that a query sees left and right of itself; None if that is not the rule."""
        if self.rule is masking_utils.causal_mask_function:
            return -1, 0
        if self.size is None:
            return None
        sliding = masking_utils.sliding_window_causal_mask_function(self.size)
        return (self.size - 1, 0) if _same(self.rule, sliding) else None


def _same(one: Any, other: Any) -> bool:
    """Two closures made alike: compared without a call, which might wait for a GPU."""
    if inspect.isfunction(one) and inspect.isfunction(other):
        return one.__code__ is other.__code__ and _same(_held(one), _held(other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, int) and isinstance(other, int) and one == other


def _held(function: FunctionType) -> tuple[Any, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


@functools.cache
def _varlen_attn() -> Function | None:
    """torch's kernel, since it knows windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(known) else None


def _fits_varlen(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    if not query.is_cuda:
        return False
    same = query.shape[-1] == value.shape[-1] <= _WIDEST
    extra = kwargs.get("dropout") or kwargs.get("is_causal") is False
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    return query.dtype in (torch.bfloat16, torch.float16) and same and not extra and not special


@dataclass(frozen=True, eq=False)
class Flash(Packed):
    """transformers' own call of a flash kernel, with the rows as its sequences."""

    def attend(
        self,
        attention: Function,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        sequences = dict(zip(names, self.layout.sequences, strict=True))
        keys, values = (self.layout.keys(x, 2) for x in (key, value))
        found: tuple[Tensor, None] = attention(
            module, query, keys, values, None, *args, **{**kwargs, **sequences}
        )
        return found

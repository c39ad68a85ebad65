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
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...layout.tree import Layout, Row

Function = Callable[..., Any]
_WHOLE = (slice(None), slice(0, None))
_WIDEST = 256  # head size of flash kernels
_HALVES = (torch.bfloat16, torch.float16)


class Refused(Exception):
    """This call runs as it did before, and why."""


@dataclass(frozen=True, eq=False)
class Packed:
    layout: Layout

    def __getitem__(self, part: tuple[Any, ...]) -> Packed:
        """As Gemma 4 takes the last `logits_to_keep` queries, all if it is 0."""
        if not all(isinstance(x, slice) and x in _WHOLE for x in part):
            raise Refused("a part of its mask is taken")
        return self

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
        # torch's would convert a bool mask in every layer, and keep each copy for the backward.
        dtype = query.dtype if attention is sdpa_attention_forward else None

        def one(row: Row, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return attention(module, q, k, v, self._masked(row, dtype), *args, **kwargs)[0]

        return self._each(one, query, key, value), None

    def _each(self, one: Function, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layout = self.layout
        keys, values = (layout.keys(x, 2).split(layout.lengths, 2) for x in (key, value))
        rows = zip(layout.rows, query.split(layout.owned, 2), keys, values, strict=True)
        return torch.cat([one(*row) for row in rows], 1)

    def _masked(self, row: Row, dtype: torch.dtype | None) -> Any:
        """Part of the mask of the row that owns most behind as many: one for all layers."""
        key = row.shared, dtype
        if key not in self.made:
            most = max(r.owned for r in self.layout.rows if r.shared == row.shared)
            mask = self.mask(row.shared, most)
            if mask is not None and dtype is not None:
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
    skips: bool = True  # may a causal mask be left out?

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
        plain = attention is sdpa_attention_forward and not args
        if not plain or self.window is None:
            return super().attend(attention, module, query, key, value, *args, **kwargs)
        kernel = _varlen_attn() if _fits_varlen(query, value, kwargs) else None
        if kernel is not None:
            return self._at_once(kernel, query, key, value, kwargs.get("scaling")), None
        if query.device.type != "cpu":  # where kernels want masks with aligned rows
            return super().attend(attention, module, query, key, value, **kwargs)

        def one(row: Row, q: Tensor, k: Tensor, v: Tensor) -> Any:
            mask = self._backwards(row, q.dtype)
            if mask is None:
                return attention(module, q, k, v, None, **kwargs)[0]
            return attention(module, q.flip(2), k, v, mask, **kwargs)[0].flip(1)

        return self._each(one, query, key, value), None

    def _at_once(
        self, kernel: Function, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        keys, values = (self.layout.keys(x, 2) for x in (key, value))
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, keys, values))
        found: Tensor = kernel(
            q,
            k,
            v,
            *self.layout.sequences,
            scale=scale,
            window_size=self.window,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return found.unsqueeze(0)

    def _backwards(self, row: Row, dtype: torch.dtype) -> Tensor | None:
        """The row's mask [1, 1, owned, length] for its queries from the last to the first.

        Query i from the end sees key j by i + j alone, so that all masks are views of one vector,
        with a stride of one both ways, and a long row needs no memory of owned × length.
        """
        assert self.window is not None
        left, length, longest = self.window[0], row.length, max(self.layout.lengths)
        if self.skips and not row.shared and (left < 0 or length <= left + 1):
            return None
        if dtype not in self.made:
            numbers = torch.arange(2 * longest - 1, dtype=torch.int64, device="cpu")
            first = longest - 1 - left if left >= 0 else 0
            hidden = (numbers < first) | (numbers >= longest)
            line = torch.zeros_like(numbers, dtype=dtype)
            self.made[dtype] = line.masked_fill_(hidden, torch.finfo(dtype).min)
        size = 1, 1, row.owned, length
        mask: Tensor = self.made[dtype].as_strided(size, (0, 0, 1, 1), longest - length)
        return mask

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


def runs_at_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Are there tensors for which torch's kernel takes all rows?"""
    return device.type == "cuda" and dtype in _HALVES and _varlen_attn() is not None


def _fits_varlen(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    if not query.is_cuda:
        return False
    same = query.shape[-1] == value.shape[-1] <= _WIDEST
    extra = kwargs.get("dropout") or kwargs.get("is_causal") is False
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    return query.dtype in _HALVES and same and not extra and not special


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

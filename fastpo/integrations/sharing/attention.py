"""Attention over a packed row, through the model's own mask and attention functions.

transformers asks its registries for both by the name of the model's implementation. While a layout
is active, the mask function is asked for every row as for a prefill that goes on: so many queries
behind so many keys. What it returns travels in the slot of the mask, into the layers and into what
a checkpoint keeps of them, and the attention function runs row by row. Windows, chunks, soft-caps,
sinks and grouped heads stay with the model's own functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...layout.tree import Layout


class Refused(Exception):
    """This call runs as it did before, and why."""


@dataclass(frozen=True, eq=False)
class RowMasks:
    """In place of a mask: the layout, and a mask for each of its rows, or None where causal."""

    layout: Layout
    masks: tuple[Any, ...]


_active: ContextVar[Layout | None] = ContextVar("fastpo_layout", default=None)


@contextmanager
def active(layout: Layout) -> Iterator[None]:
    """Masks asked for in this block are masks of the layout's rows."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


class _Mask:
    """A mask function of transformers, or all of a layout's rows' masks."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout = _active.get()
        if layout is None:
            return self.original(*args, **kwargs)
        if args or kwargs.get("use_vmap") or kwargs.get("q_length") != layout.size:
            raise Refused("a mask rule of its own")
        found: dict[tuple[int, int], Any] = {}
        for row in layout.rows:
            key = row.shared, row.owned
            if key not in found:
                found[key] = self._row(*key, kwargs)
        return RowMasks(layout, tuple(found[row.shared, row.owned] for row in layout.rows))

    def _row(self, shared: int, owned: int, kwargs: dict[str, Any]) -> Any:
        row = {
            "batch_size": 1,
            "q_length": owned,
            "kv_length": shared + owned,
            "q_offset": shared,
            "kv_offset": 0,
            "attention_mask": None,
        }
        mask = self.original(**{**kwargs, **row})
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            # Attention would convert it in every layer, and keep each copy for the backward.
            floats = torch.zeros(mask.shape, dtype=kwargs["dtype"], device=mask.device)
            mask = floats.masked_fill_(~mask, torch.finfo(kwargs["dtype"]).min)
        return mask


class _Attention:
    """An attention function of transformers, row by row where the mask slot says so."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,  # [1, heads, S, D]
        key: Tensor,  # [1, key heads, S, D]
        value: Tensor,  # [1, key heads, S, D']
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if not isinstance(attention_mask, RowMasks):
            return self.original(module, query, key, value, attention_mask, *args, **kwargs)
        layout = attention_mask.layout
        keys, values = (layout.keys(x, 2).split(layout.lengths, 2) for x in (key, value))
        rows = zip(query.split(layout.owned, 2), keys, values, attention_mask.masks, strict=True)
        found = [self.original(module, *row, *args, **kwargs)[0] for row in rows]
        return torch.cat(found, 1), None


def _eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Each model file has its own."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def install(implementation: str) -> None:
    """Hooks in both registries, which pass on whatever no layout of ours is in; they stay: a
    checkpoint may run layers again at any time."""
    masks, attentions = AttentionMaskInterface._global_mapping, AttentionInterface._global_mapping
    if implementation not in masks:
        raise Refused(f"attention {implementation!r}")
    mask: Any = masks[implementation]
    if not isinstance(mask, _Mask):
        AttentionMaskInterface.register(implementation, _Mask(mask))
    original = attentions.get(implementation, _eager)
    if not isinstance(original, _Attention):
        AttentionInterface.register(implementation, _Attention(original))


def restore() -> None:
    """Both registries as they were."""
    for interface in (AttentionMaskInterface, AttentionInterface):
        for name, function in list(interface._global_mapping.items()):
            if isinstance(function, _Mask | _Attention):
                if function.original is _eager:
                    del interface._global_mapping[name]
                else:
                    interface.register(name, function.original)

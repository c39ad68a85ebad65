"""Attention over a packed row, through the model's own mask and attention functions.

transformers asks its registries for both by the name of the model's implementation. While a layout
is active, the mask function is asked for every row as for a prefill that goes on: so many queries
behind so many keys. What it returns travels in the slot of the mask, into the layers and into what
a checkpoint keeps of them, and the attention function runs row by row. Windows, chunks, soft-caps,
sinks and grouped heads stay with the model's own functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils, modeling_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...layout.tree import Layout
from ..seams.during import during
from ..seams.seam import Seam
from .packed import Flash, Packed, Refused, Rows, Sdpa

# Models serve "eager" themselves, each file its own function, as the default of this lookup.
_EAGER = Seam(
    "transformers.modeling_utils",
    "AttentionInterface.get_interface",
    ("attn_implementation", "default"),
    ("5",),
)
# What a mask function is asked by, besides what is passed through.
_ASKED = {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "attention_mask"}


_active: ContextVar[Layout | None] = ContextVar("fastpo_layout", default=None)


@contextmanager
def active(layout: Layout) -> Iterator[None]:
    """Masks asked for in this block are those of the layout's rows."""
    with during(_active, layout):
        yield


class _Mask:
    """A mask function of transformers, or how all of a layout's rows attend."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A compiler cannot read the variable, and no layout is active in what it compiles.
        layout = None if torch.compiler.is_compiling() else _active.get()
        if layout is None:
            return self.original(*args, **kwargs)
        if args or kwargs.get("use_vmap") or kwargs.get("q_length") != layout.size:
            raise Refused("a mask rule of its own")
        rule = kwargs.get("mask_function", masking_utils.causal_mask_function)
        if _looks_ahead(rule):
            raise Refused("attention that is not causal")
        if self.original is masking_utils.flash_attention_mask:
            return Flash(layout)
        if self.original is masking_utils.flex_attention_mask:
            return self._ask(kwargs, 0, layout.size, mask_function=_in_tree(layout, rule))
        row = functools.partial(self._ask, kwargs)
        if self.original is masking_utils.sdpa_mask:
            skips = kwargs.get("allow_is_causal_skip", True)
            return Sdpa(layout, row, rule=rule, size=kwargs.get("local_size"), skips=skips)
        return Rows(layout, row)

    def _ask(self, kwargs: dict[str, Any], shared: int, owned: int, **changes: Any) -> Any:
        row = {
            "batch_size": 1,
            "q_length": owned,
            "kv_length": shared + owned,
            "q_offset": shared,
            "kv_offset": 0,
            "attention_mask": None,
        }
        return self.original(**{**kwargs, **row, **changes})


def _looks_ahead(rule: Callable[..., Any]) -> bool:
    """Asked of the rule: in a model that is not trained yet the probe may not see it."""
    first, second = (torch.tensor(i, dtype=torch.int64, device="cpu") for i in (0, 1))
    return bool(rule(first, first, first, second))


def _in_tree(layout: Layout, rule: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's rule between tokens of one row."""
    segment, end, depth = layout.tree

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (segment[k] <= segment[q]) & (segment[q] < end[k])
        seen: Tensor = inside & rule(batch, head, depth[q], depth[k])
        return seen

    return sees


class _Attention:
    """An attention function of transformers, or what the mask slot says instead."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attention_mask, Packed):
            return attention_mask.attend(self.original, module, query, key, value, *args, **kwargs)
        return self.original(module, query, key, value, attention_mask, *args, **kwargs)


def install(implementation: str) -> None:
    """Hooks that pass on whatever no layout of ours is in; they stay: a checkpoint may run layers
    again at any time."""
    mask: Any = AttentionMaskInterface._global_mapping.get(implementation)
    if mask is None:
        raise Refused(f"attention {implementation!r}")
    if not isinstance(mask, _Mask):
        missing = _ASKED - set(inspect.signature(mask).parameters)
        if missing:
            raise Refused(f"a mask function that does not take {', '.join(sorted(missing))}")
        AttentionMaskInterface.register(implementation, _Mask(mask))
    if implementation == "eager":
        _serve_eager()
        return
    attention: Any = AttentionInterface._global_mapping[implementation]
    if not isinstance(attention, _Attention):
        AttentionInterface.register(implementation, _Attention(attention))


def takes_lengths(implementation: str) -> bool:
    """Is it a kernel that skips the pairs that pads and masks hide?"""
    mask: Any = AttentionMaskInterface._global_mapping.get(implementation)
    own = mask.original if isinstance(mask, _Mask) else mask
    return own in (masking_utils.flash_attention_mask, masking_utils.flex_attention_mask)


def _serve_eager() -> None:
    get = _EAGER.read()
    if hasattr(get, "hidden"):
        return

    @functools.wraps(get)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
        found = get(self, attn_implementation, default)
        if (
            found is default
            and attn_implementation == "eager"
            and not torch.compiler.is_compiling()
        ):
            return _hooked(default)
        return found

    get_interface.hidden = get  # type: ignore[attr-defined]
    _EAGER.write(get_interface)


_hooked = functools.cache(_Attention)


def stands(implementation: str) -> bool:
    """Are the hooks what models find in the registries? Others may have registered since, or
    hold a function of their own."""
    masks, attentions = (
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
        modeling_utils.ALL_ATTENTION_FUNCTIONS,
    )
    found = attentions.get_interface(implementation, _nothing)
    return isinstance(masks.get(implementation), _Mask) and isinstance(found, _Attention)


def _nothing() -> None:
    """In place of a model file's own function."""


def restore() -> None:
    """Both registries as they were."""
    for interface in (AttentionMaskInterface, AttentionInterface):
        registered: dict[str, Any] = interface._global_mapping
        for name, function in list(registered.items()):
            if isinstance(function, _Mask | _Attention):
                interface.register(name, function.original)
    hidden = getattr(_EAGER.current(), "hidden", None)
    if hidden is not None:
        _EAGER.write(hidden)

"""One walk over a model, each call: what somebody may have changed in it since it was probed."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..seams import hooks
from ..seams.calls import beneath


class Look(NamedTuple):
    parts: tuple[Any, ...]  # kinds of layers, hooks, forwards of somebody's own
    modes: bytes  # which layers are in training
    compiled: bool  # is a part of it? It would be compiled again for every layout
    drops: bool  # does a layer of torch's draw noise?
    neftune: bool  # noise on embeddings, as large as a row is long


def look(model: nn.Module) -> Look:
    parts: list[Any] = []
    modes: list[bool] = []
    compiled = drops = neftune = False
    seen: set[int] = set()
    left: list[nn.Module | None] = [model]
    while left:
        layer = left.pop()
        if layer is None or id(layer) in seen:
            continue
        seen.add(id(layer))
        held, children, training = layer.__dict__, layer._modules, layer.training
        left += children.values()
        parts.append(type(layer))
        modes.append(training)
        compiled |= held.get("_compiled_call_impl") is not None or "_orig_mod" in children
        if training:
            drops |= bool(held.get("p")) and isinstance(layer, _DropoutNd)
            neftune |= "neftune_noise_alpha" in held
        if "forward" in held or layer._forward_hooks or layer._forward_pre_hooks:
            own = beneath(layer, "forward")
            compiled |= is_compiled(own)
            # What is on the model itself is around ours.
            parts.append(layer is model or (*hooks.own_numbers(layer), _itself(own)))
    return Look((*parts, hooks.global_numbers()), bytes(modes), compiled, drops, neftune)


def _itself(forward: Any) -> Any:
    """Not its id, which the next one gets when it is gone; nor held, as it may hold the model."""
    try:
        return weakref.ref(forward)
    except TypeError:
        return forward


def is_compiled(forward: Any) -> bool:
    """By `torch.compile(forward)`, which leaves no other trace."""
    return hasattr(forward, "_torchdynamo_orig_callable")

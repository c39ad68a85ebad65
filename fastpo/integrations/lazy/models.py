"""Models whose `.logits` are a promise: one, or every causal language model of transformers.

The model's own forward runs; for its length the head answers with a promise. Nothing of this is
there while `generate` samples, in a compiled region, or once the handle is given up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from ...ops.shards.gathered import HeadOptions
from ..heads import output_layer
from ..seams.calls import answering
from ..seams.handle import Handle, attached
from ..seams.saying import say_once
from ..seams.wrappers import bare
from . import ddp
from .head import lazy_head


def lazy_logits(
    model: nn.Module, *, budget: int | None = None, backend: str | None = None
) -> LazyModel:
    """`model(...)` is what it was, and its `.logits` [B, T, V] are a promise.

    model: a transformers model with a head (`get_output_embeddings()`), or one wrapped by PEFT.
    budget, backend: as in `fastpo.linear_logps`.

    What reads log-probabilities, cross-entropies, log-sum-exps, entropies, divergences, means,
    maxima or a few words of the logits gets them without [B, T, V] in memory, whatever views,
    masks, casts, temperatures and soft-caps lie between; anything else finds the real logits, with
    their gradient, and the log says once what and where. Values and gradients are the model's.

    Returns a handle: `detach()` gives the model back, as does leaving `with lazy_logits(model):`.
    `generate` runs on the model's own logits; a head that cannot be read later (of FSDP1 or
    ZeRO-3, or quantised in a way that is not known) keeps them, too, and the log says so.

    Raises ValueError for a model without a head, or with a fastpo head already; RuntimeError when
    logits are read after the head's weight has changed.
    """
    base = bare(model)
    if output_layer(base) is None:
        raise ValueError(f"model: expected one with output embeddings, got {type(base).__name__}")
    if attached(base):
        raise ValueError(
            f"model: expected one without a fastpo head, got {type(base).__name__}; "
            "detach() of the handle takes that off"
        )
    return LazyModel(base, HeadOptions(budget=budget, backend=backend, name="lazy_logits"))


class LazyModel(Handle):
    """A model with lazy logits; `detach()` makes them its own again."""

    def __init__(self, model: nn.Module, options: HeadOptions) -> None:
        self.options = options
        super().__init__(model)

    def begin(self) -> None:
        ddp.serve()

    def run(self, model: Any, args: Any, kwargs: Any) -> Any:
        own = self.below(model)
        if not self.active:
            return own(*args, **kwargs)
        return lazily(own, model, self.options, args, kwargs)


def lazily(
    own: Callable[..., Any], model: Any, options: HeadOptions, args: Any, kwargs: Any
) -> Any:
    """`own(*args, **kwargs)`, the model's forward, with a promise of logits."""
    if torch.compiler.is_compiling():
        _say_compiled(type(model).__name__)
        return own(*args, **kwargs)
    if _sampling():
        return own(*args, **kwargs)
    with lazy_head(type(model).__name__, model, options):
        return own(*args, **kwargs)


# While a compiler traces the call; up to torch 2.12 it takes no model for a constant.
@torch.compiler.assume_constant_result
def _say_compiled(model: str) -> None:
    if not (_sampling() or answering()):
        say_once(f"{model} keeps its full logits", "it is compiled")


def _sampling() -> bool:
    """Is this a step of transformers' `generate`, which wants logits of one position?"""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers.generation."):
            return True
        frame = frame.f_back
    return False

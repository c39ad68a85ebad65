"""Lazy logits in every causal language model of transformers in this process.

The classes' own `forward` is stood in for, of those that are there and of others as their models
are built: copies, replicas and wrappers of a model find it, and nothing is kept on the model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from ...ops.shards.gathered import HeadOptions
from ..seams.handle import presented
from ..seams.seam import Method, Seam, replace_when_imported, restore
from . import ddp
from .models import lazily

_BUILT = Seam("transformers.modeling_utils", "PreTrainedModel.post_init", (), ("4", "5"))


class _Switch:
    """Options while it is on; the classes whose forward is ours, with their own and ours."""

    options: HeadOptions | None = None
    forwards: ClassVar[dict[type, tuple[Callable[..., Any], Callable[..., Any]]]] = {}


class _Built(Method):
    """`post_init`, the last line of every model's constructor."""

    def __call__(self, model: Any) -> Any:
        found = self.original(model)
        _serve(type(model))
        return found


def install(options: HeadOptions) -> None:
    """A second call changes the options."""
    _Switch.options = options
    ddp.serve()
    replace_when_imported({_BUILT: _Built})
    module = sys.modules.get("transformers.modeling_utils")
    if module is not None:
        for kind in _descendants(module.PreTrainedModel):
            _serve(kind)


def remove() -> None:
    """Every class has its own forward again."""
    _Switch.options = None
    restore(_BUILT)
    for kind, (own, ours) in _Switch.forwards.items():
        if vars(kind)["forward"] is ours:
            kind.forward = own  # type: ignore[attr-defined]
    _Switch.forwards.clear()


@contextmanager
def kept() -> Iterator[None]:
    """On exit it is on or off as it was on entry."""
    before = _Switch.options
    try:
        yield
    finally:
        remove()
        if before is not None:
            install(before)


def _serve(kind: type) -> None:
    """A model that generates has a head; the class that runs it is the first with a forward."""
    from transformers import GenerationMixin

    if not issubclass(kind, GenerationMixin):
        return
    owner = next(x for x in kind.__mro__ if "forward" in vars(x))
    if owner not in _Switch.forwards and owner is not torch.nn.Module:
        own = vars(owner)["forward"]
        owner.forward = _lazy(own)  # type: ignore[attr-defined]
        _Switch.forwards[owner] = own, owner.forward  # type: ignore[attr-defined]


def _lazy(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(own, self)
        if _Switch.options is None or self.get_output_embeddings() is None:
            return bound(*args, **kwargs)
        return lazily(bound, self, _Switch.options, args, kwargs)

    return presented(forward, own)


def _descendants(kind: type) -> Iterator[type]:
    one: type
    for one in kind.__subclasses__():
        yield one
        yield from _descendants(one)

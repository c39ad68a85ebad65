"""Standing in for a method of one instance while a call of ours is under way.

A model is one object for all threads. What stands in asks a context variable whose call this is:
whoever has made none, in a thread or task of its own, meets what stood there before. It is there
while any call is under way and gone after the last one, so that between calls copies, pickles,
compilers and other wrappers find nothing of ours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

import torch

from .during import during

Handler = Callable[..., Any]


class StandIn:
    """`owner.name` on the instance, in place of `before`, what was there: one entry or none."""

    def __init__(self, owner: Any, name: str, read: str) -> None:
        self.before = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
        self.own: Handler = getattr(owner, read)

    @torch.compiler.disable  # whose call it is, is no constant
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _handlers.get().get(self, self.own)(*args, **kwargs)


# What stands in, and who answers for it in this thread or task.
_handlers: ContextVar[Mapping[StandIn, Handler]] = ContextVar(
    "fastpo_handlers", default=MappingProxyType({})
)
_lock = threading.Lock()


class _Call:
    """Under way as long as its block holds it: a KeyboardInterrupt may leave that at any point."""


_under_way: dict[StandIn, WeakSet[_Call]] = {}


@contextmanager
def standing_in(owner: Any, name: str, handler: Handler, read: str | None = None) -> Iterator[None]:
    """In this thread or task `handler` answers for `owner.name`, for the length of a block.

    read: where the owner gives what answers everywhere else, if not at `name`.
    """
    call = _Call()
    with _lock:
        stand_in = vars(owner).get(name)
        if not isinstance(stand_in, StandIn):
            stand_in = StandIn(owner, name, read or name)
            # Past __setattr__: properties and PyTorch's modules have their own ideas.
            owner.__dict__[name] = stand_in
        _under_way.setdefault(stand_in, WeakSet()).add(call)
    try:
        with during(_handlers, {**_handlers.get(), stand_in: handler}):
            yield
    finally:
        with _lock:
            _leave(owner, name, stand_in, call)


def _leave(owner: Any, name: str, stand_in: StandIn, call: _Call) -> None:
    _under_way[stand_in].discard(call)
    if _under_way[stand_in]:
        return
    del _under_way[stand_in]
    # What somebody put on top meanwhile stays theirs; under it ours answers as what was there.
    if vars(owner).get(name) is stand_in:
        del owner.__dict__[name]
        owner.__dict__.update(stand_in.before)


def answered(owner: Any, name: str) -> bool:
    """Does somebody stand in here, in this thread or task?"""
    return vars(owner).get(name) in _handlers.get()


def answering() -> bool:
    """Does somebody stand in for anything here, in this thread or task?"""
    return bool(_handlers.get())


def beneath(owner: Any, name: str) -> Any:
    """What the instance itself holds under this name between calls; None for nothing."""
    held = getattr(owner, "__dict__", {}).get(name)
    return held.before.get(name) if isinstance(held, StandIn) else held


def unhidden(method: Any) -> Any:
    """What a method that was read during a call is without it."""
    return method.own if isinstance(method, StandIn) else method

"""A context variable that has a value for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def during(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Not by a token, which a KeyboardInterrupt takes away if it comes as the value is set."""
    before = variable.get()
    try:
        variable.set(value)
        yield
    finally:
        variable.set(before)

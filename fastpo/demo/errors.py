"""What the demo says to the person at the terminal, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DemoError(ValueError):
    """Something in what was given that its giver can put right."""


class DemoFailure(RuntimeError):
    """A training process that did not get to its end."""


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """A DemoError of one line, whatever a library raises over a file that is anybody's."""
    try:
        yield
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DemoError(f"{what} {type(error).__name__}: {first}") from error

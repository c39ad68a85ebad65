"""What the demo says to the person at the terminal, without a traceback."""

from __future__ import annotations


class DemoError(ValueError):
    """Something in what was given that its giver can put right."""


class DemoFailure(RuntimeError):
    """A training process that did not get to its end."""

"""What a benchmark says to the person at the terminal, without a traceback."""

from __future__ import annotations


class BenchError(ValueError):
    """Something in what was given that its giver can put right."""


class DeviceLost(RuntimeError):
    """A variant left the GPU in an error that whatever runs next in this process meets, too."""

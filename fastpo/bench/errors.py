"""What a benchmark says to the person at the terminal, without a traceback."""

from __future__ import annotations


class BenchError(ValueError):
    """Something in what was given that its giver can put right."""

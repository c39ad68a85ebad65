"""The one error of the demo: something the person at the terminal can put right."""

from __future__ import annotations


class DemoError(ValueError):
    """A message without traceback; the command line ends with exit code 2."""

"""Triton kernels. A wheel has them here; in a checkout they lie in kernels/ beside fastpo/."""

from pathlib import Path

_checkout = Path(__file__).parents[2]
_sources = str(_checkout / "kernels")
# Without csrc/ this is an installed package, and a kernels/ beside it belongs to somebody else.
if (_checkout / "csrc").is_dir() and _sources not in __path__:
    __path__.append(_sources)

"""Python reads this at the start of processes that a script under `fastpo run` starts.

Python knows one module of this name: the one that this stands before is read as well.
"""

import json
import os
import runpy
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec

_HERE = os.path.dirname(os.path.abspath(__file__))


def _next() -> None:
    """The `sitecustomize` that would have been read."""
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _HERE]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.origin is not None:
        runpy.run_path(spec.origin, run_name="sitecustomize")


def _patch() -> None:
    given = os.environ.get("FASTPO_RUN")
    # The Python of another environment has no fastpo, and nothing to patch.
    if given is not None and find_spec("fastpo") is not None:
        from fastpo.integrations.run import patch_with_children

        patch_with_children(json.loads(given))


_next()
_patch()

"""`fastpo run`: an unchanged script or module under `fastpo.patched()`."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from .trl.patch import patched

_USAGE = "usage: fastpo run (script.py | -m module) [arguments]"


def run_script(argv: Sequence[str]) -> int:
    """What `python *argv` would do, with TRL patched; `argv` is `script.py a b` or `-m module a b`.

    Returns the exit code for the shell. What the script raises passes through, SystemExit too.
    """
    as_module = bool(argv) and argv[0] == "-m"
    target = argv[as_module] if len(argv) > as_module else None
    if target is None or (target.startswith("-") and not as_module):
        return _refuse("expected a script or -m and a module, got " + repr(list(argv)))
    place = os.getcwd() if as_module else os.path.dirname(os.path.abspath(target))
    with _interpreter(place, list(argv[as_module:])):
        if as_module and not _findable(target):
            return _refuse(f"module: expected one that can be imported, got {target!r}", code=1)
        if not as_module and not os.path.exists(target):
            return _refuse(f"script: expected a file, got {target!r}")
        with patched():
            if as_module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
    return 0


def _refuse(why: str, code: int = 2) -> int:
    """The codes are Python's own: 2 for a file it cannot open, 1 for a module it cannot find."""
    print(f"fastpo run: {why}\n{_USAGE}", file=sys.stderr)
    return code


def _findable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a missing parent package
        return False


@contextmanager
def _interpreter(place: str, argv: list[str]) -> Iterator[None]:
    """`sys.argv` and the first entry of `sys.path` as Python would set them."""
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = argv, [place]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before

"""Files that a command writes: asked for before its work, not found missing after it."""

from __future__ import annotations

import os
from pathlib import Path


def check_file(name: str, path: Path, *, deep: bool = False) -> None:
    """ValueError unless a file can be written there. deep: whoever writes makes its folders."""
    # A path of no name is the working folder.
    if path.is_dir():
        raise ValueError(f"{name}: expected a file to write, got the folder {str(path)!r}")
    folder = next(above for above in path.parents if above.exists()) if deep else path.parent
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{name}: expected a file in a folder to write to, got {str(path)!r}")

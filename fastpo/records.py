"""Rows of files that are anybody's: JSON lines, one JSON array, or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_records(path: Path) -> Iterable[tuple[int, Any]]:
    """(number, what stands there) of every row, a line's in JSON lines, from 1.

    Raises ValueError, of a row when it comes to it, with the path and what was expected.
    """
    if path.suffix == ".parquet" and path.is_file():
        return enumerate(_read_parquet(path), start=1)
    text = _read_text(path)
    if text.lstrip().startswith("["):
        return enumerate(_parse(text, str(path), "one JSON array"), start=1)
    # Not splitlines: a string of JSON may hold U+2028, which ends no line of the file.
    lines = enumerate(text.split("\n"), start=1)
    each = "one JSON object per line"
    return ((n, _parse(line, f"{path}, row {n}", each)) for n, line in lines if line.strip())


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow  # of datasets
    from pyarrow import parquet

    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    # The last two: texts and dates of any column that Python has no value for.
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return rows


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of rows, got a folder")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte {error.start}: {error.reason}"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(text: str, place: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or a number or depth out of bounds
        raise ValueError(f"{place}: expected {expected}, got {_short(text)} ({error})") from None


def _short(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")

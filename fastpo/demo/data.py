"""Preference pairs: the embedded ones, or a file in TRL's formats, checked row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from ..records import read_records
from .errors import DemoError

KEYS = ("prompt", "chosen", "rejected")
HERE = Path(__file__).parent
EMBEDDED = (HERE / "pairs_train.jsonl", HERE / "pairs_heldout.jsonl")
# These change what the model reads; to leave them out silently would be to train on other data.
UNSUPPORTED = ("image", "images", "tools", "chat_template_kwargs")
OF_MESSAGES = ("tool_calls", "reasoning_content", "thinking")
HELD_OUT_SHARE = 6
HELD_OUT_MAX = 64

Row = dict[str, Any]  # prompt, chosen, rejected: each a string, or each a list of messages


@dataclass(frozen=True)
class Pairs:
    """Rows to train on and rows kept back."""

    source: str
    train: list[Row]
    held_out: list[Row]
    places: dict[int, str]  # id(row) -> "FILE, row 3"

    @property
    def rows(self) -> list[Row]:
        return self.train + self.held_out

    @property
    def conversational(self) -> bool:
        return is_conversational(self.train[0])

    def evaluated_on(self, most: int) -> Pairs:
        """With at most that many held-out rows, from all over them."""
        count = min(most, len(self.held_out))
        some = [self.held_out[i * len(self.held_out) // count] for i in range(count)]
        return replace(self, held_out=some)

    def without(self, dropped: Iterable[Row]) -> Pairs:
        """The same split with those rows left out."""
        ids = {id(row) for row in dropped}
        train = [row for row in self.train if id(row) not in ids]
        held_out = [row for row in self.held_out if id(row) not in ids]
        if not train or not held_out:
            raise DemoError(f"{self.source}: expected at least 2 rows that fit, got {len(train)}")
        return Pairs(self.source, train, held_out, self.places)


def is_conversational(row: Row) -> bool:
    return isinstance(row["chosen"], list)


def embedded_pairs() -> Pairs:
    """The 400 pairs that ship with fastpo; see make_data.py for what they are."""
    train, held_out = (_places(read_rows(path), path) for path in EMBEDDED)
    return Pairs("embedded", list(train[0]), list(held_out[0]), train[1] | held_out[1])


def load_pairs(path: Path, seed: int) -> Pairs:
    """A file's rows, of which a sixth, at most 64, are drawn by `seed` and held out."""
    rows, places = _places(read_rows(path), path)
    order = list(range(len(rows)))
    Random(seed).shuffle(order)
    count = min(max(1, len(rows) // HELD_OUT_SHARE), HELD_OUT_MAX)
    count -= count % 8 if count > 8 else 0  # so that evaluation batches are all of one size
    held_out = set(order[:count])
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return Pairs(str(path), train, [rows[i] for i in sorted(held_out)], places)


def _places(numbered: list[tuple[int, Row]], path: Path) -> tuple[list[Row], dict[int, str]]:
    return [row for _, row in numbered], {id(row): f"{path}, row {n}" for n, row in numbered}


def read_rows(path: Path) -> list[tuple[int, Row]]:
    """(number, row) of every row, a line's in JSONL; DemoError names the file and the row."""
    rows: list[tuple[int, Row]] = []
    for number, found in _records(path):
        place = f"{path}, row {number}"
        row = check_row(found, place)
        if rows and is_conversational(row) != is_conversational(rows[0][1]):
            kinds = ("strings", "lists of messages")
            first = kinds[is_conversational(rows[0][1])]
            raise DemoError(f"{place}: expected {first} as in the first row, got the other format")
        rows.append((number, row))
    if len(rows) < 2:
        raise DemoError(f"{path}: expected at least 2 rows (one is held out), got {len(rows)}")
    return rows


def _records(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        yield from read_records(path)
    except ValueError as error:
        raise DemoError(str(error)) from None


def check_row(row: Any, place: str) -> Row:
    """The row's prompt, chosen and rejected; DemoError says what is wrong with it."""
    if not isinstance(row, dict):
        raise DemoError(f"{place}: expected an object with {', '.join(KEYS)}, got {_kind(row)}")
    row = _prompted(row, place)
    missing = [key for key in KEYS if key not in row]
    if missing:
        got = ", ".join(key if key.isprintable() else ascii(key) for key in row) or "no keys"
        raise DemoError(f"{place}: expected {', '.join(KEYS)}, got {got}: {missing[0]} is missing")
    _refuse(UNSUPPORTED, row, f"{place}: ")
    checked = {key: _check_side(row[key], f"{place}: {key}") for key in KEYS}
    kinds = {key: _kind(value) for key, value in checked.items()}
    if len(set(kinds.values())) > 1:
        got = ", ".join(f"{key} {kind}" for key, kind in kinds.items())
        raise DemoError(f"{place}: expected three strings or three lists of messages, got {got}")
    if checked["chosen"] == checked["rejected"]:
        raise DemoError(f"{place}: chosen and rejected are the same, nothing is preferred")
    return checked


def _refuse(keys: Iterable[str], found: dict[str, Any], name: str) -> None:
    for key in keys:
        if found.get(key):
            raise DemoError(f"{name}{key}: not supported, the demo trains on text only")


def _prompted(row: Row, place: str) -> Row:
    """With the beginning that chosen and rejected share as its prompt, where it has none."""
    sides = [row.get(key) for key in ("chosen", "rejected")]
    alike = all(isinstance(x, str) for x in sides) or all(isinstance(x, list) for x in sides)
    if row.get("prompt") is not None or not alike:
        return row
    for key in ("chosen", "rejected"):
        _check_side(row[key], f"{place}: {key}")
    from trl.data_utils import extract_prompt

    found = row | extract_prompt(row)
    if not found["prompt"]:
        raise DemoError(
            f"{place}: expected a prompt, or chosen and rejected that begin alike, got neither"
        )
    return found


def _check_side(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return _check_text(value, name)
    if not isinstance(value, list):
        raise DemoError(f"{name}: expected a string or a list of messages, got {_kind(value)}")
    if not value:
        raise DemoError(f"{name}: expected at least one message, got an empty list")
    return [_check_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _check_text(text: str, name: str) -> str:
    if not text.strip():
        raise DemoError(f"{name}: expected text, got an empty string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DemoError(f"{name}: expected valid Unicode, got {error.reason}") from None
    return text


def _check_message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DemoError(f"{name}: expected a message with role and content, got {_kind(message)}")
    _refuse(OF_MESSAGES, message, f"{name}.")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            got = _kind(message[key]) if key in message else "nothing"
            raise DemoError(f"{name}.{key}: expected a string, got {got}")
        if message["role"] != "system" or key == "role":  # which may say nothing
            _check_text(message[key], f"{name}.{key}")
    return {"role": message["role"], "content": message["content"]}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")

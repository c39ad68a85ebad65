"""How long the rows of a dataset are, by the model's own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..layout.tree import layout_of
from ..records import read_records
from .given import foreign

_ANSWERS = ("chosen", "rejected", "completion")
_WHOLE = ("text", "messages")
_FIELDS = ("prompt", *_ANSWERS, *_WHOLE)
_EMPTY: tuple[Any, ...] = (None, "", [])


@dataclass(frozen=True)
class Lengths:
    """In tokens. rows: texts counted. padding: share of a batch of 8 items in file order that is
    pads; shared: share of its tokens that others have computed, with every prompt once."""

    rows: int
    prompt: float
    answer: float
    context: int  # of 99 % of the rows
    longest: int
    padding: float
    shared: float

    @property
    def prompt_share(self) -> float:
        return min(self.prompt / (self.prompt + self.answer), 0.99)


def read_lengths(path: Path, model: Any) -> Lengths:
    from transformers import AutoTokenizer

    if not isinstance(model, str | Path) or not Path(model).is_dir():
        raise ValueError(f"data: expected a model folder with a tokenizer beside it, got {model!r}")
    with foreign(f"data: expected a tokenizer in {model}"):
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    try:
        rows = list(read_records(path))
    except ValueError as error:
        raise ValueError(f"data: {error}") from None
    items = [_texts(row, path, number) for number, row in rows]
    if not items:
        raise ValueError(f"data: expected rows in {path}, got none")
    tokens = [[_both(tokenizer, prompt, answer) for answer in answers] for prompt, answers in items]
    flat = [row for item in tokens for row in item]
    sizes = sorted(len(p) + len(a) for p, a in flat)
    padded = real = distinct = 0
    for start in range(0, len(tokens), 8):
        batch = [p + a for item in tokens[start : start + 8] for p, a in item]
        padded += max(map(len, batch)) * len(batch)
        real += sum(map(len, batch))
        distinct += _distinct(batch)
    mean_prompt, mean_answer = (sum(len(row[i]) for row in flat) / len(flat) for i in range(2))
    context = sizes[min(int(0.99 * len(sizes)), len(sizes) - 1)]
    return Lengths(
        len(flat), mean_prompt, mean_answer, max(context, 2), sizes[-1],
        1 - real / padded, 1 - distinct / real,
    )  # fmt: skip


def _distinct(batch: list[list[int]]) -> int:
    width = max(map(len, batch))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    return layout_of(ids, mask).size


def _texts(row: Any, path: Path, number: int) -> tuple[Any, list[Any]]:
    """Prompt, perhaps "", and what follows it: strings, or lists of turns."""
    filled = {}
    if isinstance(row, dict):
        filled = {name: row[name] for name in _FIELDS if row.get(name) not in _EMPTY}
    answers = [filled[name] for name in _ANSWERS if name in filled]
    prompt = filled.get("prompt", "") if answers else ""
    answers = answers or [filled[name] for name in _WHOLE if name in filled][:1]
    texts = [*answers, prompt] if prompt else answers
    # A string beside turns would be left out by the tokenizer's template.
    if answers and (all(isinstance(x, str) for x in texts) or all(map(_is_chat, texts))):
        pair = {"chosen", "rejected"} <= filled.keys() and row.get("prompt") is None
        return _in_common(filled) if pair else (prompt, answers)
    wanted = "prompt with chosen and rejected or completion, or text, or messages"
    kinds = (f"{name} ({type(value).__name__})" for name, value in filled.items())
    raise ValueError(
        f"data: expected {wanted}, all of them strings or lists of turns, in {path} row {number}, "
        f"got {', '.join(kinds) or 'none'}"
    )


def _in_common(pair: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The prompt of a pair that has none of its own: what both begin with, as TRL takes it."""
    from trl.data_utils import extract_prompt

    found = extract_prompt(pair)
    return found["prompt"], [found["chosen"], found["rejected"]]


def _is_chat(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(turn, dict) for turn in x)


def _both(tokenizer: Any, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    with foreign("data: expected texts that the tokenizer takes"):
        if isinstance(answer, str):
            ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, answer)]
            return ids[0], ids[1]
        apply = tokenizer.apply_chat_template
        before = apply(prompt, tokenize=True, return_dict=False) if prompt else []
        whole = apply([*prompt, *answer], tokenize=True, return_dict=False)
    return whole[: len(before)], whole[len(before) :]

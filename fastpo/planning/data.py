"""How long the rows of a dataset are, by the model's own tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..layout.tree import layout_of

_ANSWERS = ("chosen", "rejected", "completion")


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"data: expected a tokenizer in {model}, got {line}") from error
    items = [_texts(row, path, i) for i, row in enumerate(_rows(path), 1)]
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


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: expected a readable file, got {path}: {error}") from error
    try:
        if text.lstrip().startswith("["):
            found: list[Any] = json.loads(text)
            return found
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"data: expected JSON lines in {path}, got {error}") from error


def _texts(row: Any, path: Path, number: int) -> tuple[Any, list[Any]]:
    if isinstance(row, dict):
        answers = [row[name] for name in _ANSWERS if row.get(name)]
        if answers:
            return row.get("prompt") or "", answers
        whole = row.get("text") or row.get("messages")
        if whole:
            return "", [whole]
    wanted = "prompt with chosen and rejected or completion, or text, or messages"
    raise ValueError(f"data: expected {wanted} in {path} row {number}")


def _both(tokenizer: Any, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    if isinstance(prompt, str) and isinstance(answer, str):
        ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, answer)]
        return ids[0], ids[1]
    turns = prompt if isinstance(prompt, list) else []
    apply = tokenizer.apply_chat_template
    before = apply(turns, tokenize=True, return_dict=False) if turns else []
    whole = apply(turns + answer, tokenize=True, return_dict=False)
    return whole[: len(before)], whole[len(before) :]

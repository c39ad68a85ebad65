"""Columns of a dataset that TRL's collators do not know, carried beside the batch they build."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ....objectives._quantities import SHAPES, is_mask

Example = Mapping[str, Any]
Batch = dict[str, Any]

# Further texts an example may have, and what a batch holds of each.
TEXTS = ("third", "unlabeled")
ROWS = ("input_ids", "attention_mask", "completion_mask")

# Side of a quantity -> the tokens of TRL's example it lies along.
PAIRS = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
SINGLES = {"": "completion_ids"}


class Carry:
    """A TRL collator, and beside its batch the named columns, the third texts and the masks.

    Per-token columns are lists along the completion's tokens, end-of-sequence token included.
    Where truncation and padding put each of them is asked of TRL's collator itself: it is given
    numbers instead of tokens.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Batch],
        columns: Sequence[str],
        sides: Mapping[str, str],
        *,
        texts: Sequence[str] = (),
        score_prompts: bool = False,
    ) -> None:
        self.collator, self.columns, self.sides = collator, columns, sides
        self.texts, self.score_prompts = texts, score_prompts

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = self.collator(list(examples))
        present = [name for name in self.columns if name in examples[0]]
        tokens = [name for name in present if _along_tokens(name)]
        positions = self._positions(examples) if tokens else {}
        for name in present:
            values = [example[name] for example in examples]
            if name in tokens:
                side = self._side(name)
                self._check_lengths(name, values, examples, side)
                batch[name] = _placed(name, values, positions[side])
            else:
                batch[name] = _stacked(name, values, batch["input_ids"].device)
            _check_numbers(name, batch[name])
        if self.score_prompts:
            batch["completion_mask"] = batch["attention_mask"].clone()
        self._narrow(batch, tokens)
        for text in self.texts:
            batch |= self._text(text, examples)
        return batch

    def _positions(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Side -> [B, T + 1], at each kept completion token its number from 1; 0 elsewhere."""
        if "prompt_ids" not in examples[0]:
            raise ValueError(
                "columns: expected token columns with tokenized texts only, got images"
            )
        ids = self.sides.values()
        numbered = [
            {
                "label": True,
                "prompt_ids": [0] * len(example["prompt_ids"]),
                **{key: list(range(1, len(example[key]) + 1)) for key in ids},
            }
            for example in examples
        ]
        found = self.collator(numbered)
        codes = found["input_ids"] * found["completion_mask"]
        return dict(zip(self.sides, codes.chunk(len(self.sides)), strict=True))

    def _side(self, name: str) -> str:
        return next((side for side in self.sides if side and f"{side}_" in name), "")

    def _check_lengths(
        self, name: str, values: list[Any], examples: Sequence[Example], side: str
    ) -> None:
        for value, example in zip(values, examples, strict=True):
            expected = len(example[self.sides[side]])
            if len(value) != expected:
                key = self.sides[side]
                raise ValueError(
                    f"{name}: expected {expected} values, one per token of {key}, got {len(value)}"
                )

    def _narrow(self, batch: Batch, tokens: Sequence[str]) -> None:
        """A mask column takes positions out of TRL's own mask, so that nothing scores them."""
        masks = [f"{side}_mask" if side else "mask" for side in self.sides]
        if not any(name in tokens for name in masks):
            return
        for part, name in zip(batch["completion_mask"].chunk(len(masks)), masks, strict=True):
            if name in tokens:
                part[:, 1:] *= batch.pop(name)

    def _text(self, text: str, examples: Sequence[Example]) -> Batch:
        """Token ids and masks of a third text, padded and truncated as TRL does its own."""
        rows = [
            {
                "label": True,
                "prompt_ids": example[f"{text}_prompt_ids"],
                **dict.fromkeys(self.sides.values(), example[f"{text}_ids"]),
            }
            for example in examples
        ]
        found = self.collator(rows)
        return {f"{text}_{key}": found[key][: len(rows)] for key in ROWS}


def _along_tokens(name: str) -> bool:
    return all("T" in shape for shape in SHAPES[name])


def _placed(name: str, values: list[Any], positions: Tensor) -> Tensor:
    """[B, T] the values of the tokens that are predicted, i.e. all but the first position."""
    whole = name.endswith("segments")
    fill: Any = -1 if whole else 0
    dtype = torch.int64 if whole or is_mask(name) else torch.float32
    rows = []
    for value, position in zip(values, positions, strict=True):
        padded = torch.tensor([fill, *value], dtype=dtype, device=position.device)
        rows.append(padded[position])
    return torch.stack(rows)[:, 1:]


def _check_numbers(name: str, values: Tensor) -> None:
    """Of a NaN the loss would be NaN, too, which transformers' log shows as 0."""
    wrong = values.isnan()
    if not name.startswith("sampler_") and bool(wrong.any()):  # engines mark what they do not know
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name}: expected numbers, got NaN at {place} of the batch")


def _stacked(name: str, values: list[Any], device: torch.device) -> Tensor:
    """[B], [B, D], or [K, B] for columns of several models."""
    fractions = any(isinstance(x, float) for x in tree_leaves(values))
    try:
        tensor = torch.tensor(values, dtype=torch.float32 if fractions else None, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected equally many numbers per row, got {error}") from error
    return tensor.t().contiguous() if SHAPES[name][0] == ("K", "B") else tensor

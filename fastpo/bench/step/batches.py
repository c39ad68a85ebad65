"""The rows of a step: random words, behind prompts that rows have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import BenchError

_IGNORED = -100
SWEEP = ("4:1", "4:1,equal", "8:1", "1:1", "1:4", "1:1,4", "1:1,8", "1:1,16", "1:1,equal,1")
# Of its size, the least that is drawn where rows are ragged.
_LEAST_PROMPT, _LEAST_COMPLETION = 0.6, 0.4


class Batch(NamedTuple):
    """Right-padded, chosen rows first."""

    ids: Tensor  # [R, T]
    mask: Tensor  # [R, T], 0 at pads
    labels: Tensor  # [R, T], -100 where no completion is


@dataclass(frozen=True)
class Texts:
    """prompt : completion is the ratio of sizes; `group` rows have one prompt, 1: each its own."""

    prompt: int = 1
    completion: int = 1
    group: int = 2
    ragged: bool = False

    @classmethod
    def parse(cls, text: str) -> Texts:
        """P:C[,equal][,K]"""
        ratio, *words = text.split(",")
        numbers = [word for word in words if word != "equal"] or ["2"]
        try:
            prompt, completion, group = map(int, (*ratio.split(":"), *numbers))
        except ValueError:
            group = prompt = completion = 0
        if min(prompt, completion, group) < 1 or (group > 1 and group % 2):
            wanted = "P:C[,equal][,K] with K rows of one prompt, 1 or even"
            raise BenchError(f"--shared-prompts: expected {wanted}, got {text!r}")
        return cls(prompt, completion, group, "equal" not in words)

    def __str__(self) -> str:
        parts = [f"{self.prompt}:{self.completion}"]
        parts += [] if self.ragged else ["equal lengths"]
        if self.group != 2:
            parts.append(f"{self.group} of a prompt" if self.group > 1 else "nothing shared")
        return ", ".join(parts)

    def rows(self, pairs: int, length: int, vocab: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Prompt and completion of every row; `length` bounds the two together."""
        g = torch.Generator().manual_seed(pairs * length)

        def words(size: int, least: float) -> Tensor:
            share = least + (1 - least) * torch.rand((), generator=g).item() if self.ragged else 1.0
            return torch.randint(vocab, (max(1, round(share * size)),), generator=g)

        size = max(1, length * self.prompt // (self.prompt + self.completion))
        prompts: dict[int, Tensor] = {}
        for row in range(2 * pairs):
            which = row % pairs // (self.group // 2) if self.group > 1 else row
            if which not in prompts:
                prompts[which] = words(size, _LEAST_PROMPT)
            yield prompts[which], words(length - size, _LEAST_COMPLETION)


@lru_cache(maxsize=1)
def batch(texts: Texts, pairs: int, length: int, vocab: int, device: str) -> Batch:
    """Drawn once: a step's time is not that of making its words."""
    rows = list(texts.rows(pairs, length, vocab))
    ids = [torch.cat(row) for row in rows]
    labels = [torch.cat((torch.full_like(prompt, _IGNORED), words)) for prompt, words in rows]
    mask = [torch.ones_like(row) for row in ids]
    made = (
        pad_sequence(x, batch_first=True, padding_value=pad)
        for x, pad in ((ids, 0), (mask, 0), (labels, _IGNORED))
    )
    return Batch(*(x.to(device) for x in made))

"""What sharing prompts adds to trainers: a number in their log, and groups that stay together."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..seams.seam import Make, Method, Replacement, Seam

_METRIC = "fastpo/tokens_saved"
_LOG = Seam("transformers.trainer", "Trainer.log", ("logs", "start_time"), ("5",))
_SHUFFLES = tuple(
    Seam(
        f"trl.trainer.{name}_trainer",
        "shuffle_sequence_dict",
        ("seq_dict",),
        ("1.13", "1.14", "1.15", "1.16"),
    )
    for name in ("grpo", "rloo")
)


class _Log(Method):
    """`Trainer.log`, to which all others come down: adds the share of tokens not computed."""

    def __call__(
        self, trainer: Any, logs: dict[str, float], start_time: float | None = None
    ) -> None:
        from ..sharing.backbone import take_tokens  # imports transformers

        models = [getattr(trainer, name, None) for name in ("model", "ref_model")]
        tokens = take_tokens(model for model in models if model is not None)
        if tokens.padded:
            evaluates = any(name.startswith("eval_") for name in logs)
            logs["eval_" * evaluates + _METRIC] = tokens.saved
        self.original(trainer, logs, start_time)


class _Shuffle(Replacement):
    """`shuffle_sequence_dict`: rows of one prompt, which come one after the other, stay so."""

    def __call__(self, seq_dict: dict[str, Any]) -> dict[str, Any]:
        lengths = _groups(seq_dict["prompt_ids"])
        groups = {name: _split(rows, lengths) for name, rows in seq_dict.items()}
        return {name: _joined(rows) for name, rows in self.original(groups).items()}


def _groups(prompts: Tensor) -> list[int]:  # [rows, T]
    """How many rows there are of each prompt; the same one twice in a row is one."""
    _, lengths = torch.unique_consecutive(prompts, dim=0, return_counts=True)
    found: list[int] = lengths.tolist()
    return found


def _split(rows: Any, lengths: list[int]) -> Any:
    if rows is None or (isinstance(rows, Tensor) and rows.ndim == 0):
        return rows
    if isinstance(rows, Tensor):
        return list(rows.split(lengths))
    each = iter(rows)
    return [[next(each) for _ in range(length)] for length in lengths]


def _joined(groups: Any) -> Any:
    if not isinstance(groups, list):
        return groups
    return torch.cat(groups) if isinstance(groups[0], Tensor) else [*chain(*groups)]


def replacements(sharing: bool | None, whole_groups: bool) -> dict[Seam, Make]:
    made: dict[Seam, Make] = {} if sharing is None else {_LOG: _Log}
    return {**made, **(dict.fromkeys(_SHUFFLES, _Shuffle) if whole_groups else {})}


def check(sharing: bool | None, whole_groups: bool) -> None:
    if whole_groups and not sharing:
        raise ValueError("whole_groups: expected shared_prompts=True with it, got False")

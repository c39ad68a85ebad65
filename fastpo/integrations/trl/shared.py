"""What sharing prompts adds to trainers: a number in their log, and groups that stay together.

Most share where their head is fused or their logits are read; DistillationTrainer here.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..seams.seam import Make, Method, Replacement, Seam

_METRIC = "fastpo/tokens_saved"
_LOG = Seam("transformers.trainer", "Trainer.log", ("logs", "start_time"), ("5",))
_EVALUATE = Seam(
    "transformers.trainer",
    "Trainer.evaluate",
    ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    ("5",),
)
_VERSIONS = ("1.13", "1.14", "1.15", "1.16")
_SHUFFLES = tuple(
    Seam(f"trl.trainer.{name}_trainer", "shuffle_sequence_dict", ("seq_dict",), _VERSIONS)
    for name in ("grpo", "rloo")
)
_HIDDEN = Seam(
    "trl.trainer.distillation_trainer",
    "DistillationTrainer._get_last_hidden_state",
    (
        "unwrapped_model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "pixel_values",
        "image_grid_thw",
        "pixel_attention_mask",
        "spatial_shapes",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ),
    _VERSIONS,
)
# A trainer's attributes whose backbones share.
_MODELS = ("model", "ref_model", "teacher_model")


class _Log(Method):
    """`Trainer.log`, to which all others come down: adds the share of tokens not computed."""

    def __call__(
        self, trainer: Any, logs: dict[str, float], start_time: float | None = None
    ) -> None:
        from ..sharing.backbone import take_tokens  # imports transformers

        tokens = take_tokens(_models(trainer))
        if tokens.padded:
            # As TRL does of its own metrics, whatever prefix an evaluation was given.
            logs[_METRIC if trainer.model.training else f"eval_{_METRIC}"] = tokens.saved
        self.original(trainer, logs, start_time)


class _Evaluate(Method):
    """`Trainer.evaluate`: between two logs of a training, which count its own steps."""

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        from ..sharing.backbone import tokens_apart  # imports transformers

        with tokens_apart(_models(trainer)):
            return self.original(trainer, *args, **kwargs)


def _models(trainer: Any) -> list[nn.Module]:
    models = (getattr(trainer, name, None) for name in _MODELS)
    return [model for model in models if isinstance(model, nn.Module)]


class _Hidden(Method):
    """What student and teacher are asked for: hidden states of their backbones."""

    def __init__(self, original: Any, sharing: bool) -> None:
        super().__init__(original)
        self.sharing = sharing

    def __call__(self, trainer: Any, unwrapped_model: Any, *args: Any, **kwargs: Any) -> Any:
        from ..sharing.backbone import packing  # imports transformers

        with packing(unwrapped_model, self.sharing):
            return self.original(trainer, unwrapped_model, *args, **kwargs)


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
    made: dict[Seam, Make] = {}
    if sharing is not None:
        made |= {_LOG: _Log, _EVALUATE: _Evaluate, _HIDDEN: partial(_Hidden, sharing=sharing)}
    return {**made, **(dict.fromkeys(_SHUFFLES, _Shuffle) if whole_groups else {})}

"""TRL's distillation trainers: two heads, and the divergence between them without logits.

DistillationTrainer hands hidden states to one function: `fused_pair`. GKD, GOLD, IW-OPD, SDPO and
SDFT take the logits of student and teacher: both heads are lazy while they do, and where the two
meet fastpo computes the divergence per token. A server's teacher has log-probabilities of a few
words only. Masks and reductions stay TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.shards.gathered import HeadOptions
from ..lazy.divergences import divergence
from ..lazy.logits import promises
from ..seams.seam import Make, Replacement, Seam
from . import fused_pair
from .gold import Sorted
from .logits import LOSS, Reader

_EXPERIMENTAL = ("1.13", "1.14", "1.15", "1.16")


class _Rows:
    """In place of logits in TRL's loss: its elementwise divergence is the rows we have."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __truediv__(self, temperature: Any) -> _Rows:
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (F.log_softmax, torch.log_softmax):
            return args[0]
        if func is F.kl_div:
            return args[0].rows.unsqueeze(-1)
        raise RuntimeError(f"generalized_jsd_loss: expected log_softmax and kl_div, got {func}")


class _JSD(Replacement):
    """`generalized_jsd_loss`, static in three trainers."""

    def __call__(
        self,
        student_logits: Any,
        teacher_logits: Any,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        **options: Any,
    ) -> Any:
        plain = not any(options.get(name) for name in ("top_k", "logits_are_probs"))
        heads = None
        if plain and reduction in ("batchmean", "sum"):
            heads = promises(student_logits, teacher_logits)
        if heads is None:
            logits = (student_logits, teacher_logits)  # lazy ones say what they compute in full
            return self.original(*logits, labels, beta, temperature, reduction, **options)
        student, teacher = (side.scaled(1 / temperature) for side in heads)
        if labels is not None:
            student = student.only(labels != -100)
        rows = _Rows(divergence(student, teacher, "jsd", beta))
        return self.original(rows, rows, labels, 0, 1.0, reduction, **options)


class _FullLogits(Replacement):
    """`compute_full_logit_self_distillation_loss` is the primitive."""

    def __call__(
        self, student_logits: Any, teacher_logits: Any, *, distillation_alpha: float
    ) -> Any:
        heads = promises(student_logits, teacher_logits)
        if heads is not None:
            return divergence(*heads, "jsd", distillation_alpha)
        return self.original(student_logits, teacher_logits, distillation_alpha=distillation_alpha)


class _TwoHeads(Reader):
    """`compute_loss` of a trainer with a teacher in this process."""

    others = ("teacher_model",)


class _Divided(_TwoHeads):
    """One whose loss is `generalized_jsd_loss` and nothing else."""

    def shards(self, trainer: Any) -> bool:
        return not getattr(trainer.args, "use_uld_loss", False)  # GOLD's across tokenizers


_LOSS = (*LOSS, "num_items_in_batch")
_PAIR = ("teacher_logits", "labels", "beta", "temperature", "reduction")
_ULD = (
    "student_logits",
    "teacher_logits",
    "student_labels",
    "teacher_labels",
    "student_input_ids",
    "teacher_input_ids",
    "student_byte_offsets",
    "teacher_byte_offsets",
)
_FORWARD = ("model", "input_ids", "attention_mask", "logits_to_keep")
_SELF = ("student_logits", "teacher_logits", "distillation_alpha")
_TABLE: tuple[tuple[str, str, tuple[str, ...], Make], ...] = (
    ("gkd", "GKDTrainer.compute_loss", _LOSS, _Divided),
    ("gkd", "GKDTrainer.generalized_jsd_loss", (*_PAIR, "num_items_in_batch"), _JSD),
    ("gold", "GOLDTrainer.compute_loss", _LOSS, _Divided),
    (
        "gold",
        "GOLDTrainer.generalized_jsd_loss",
        (*_PAIR, "logits_are_probs", "num_items_in_batch"),
        _JSD,
    ),
    ("gold", "ULDLoss._compute_distillation_loss", _ULD, Sorted),
    ("iw_opd", "IWOPDTrainer.compute_loss", _LOSS, _TwoHeads),
    (
        "iw_opd",
        "IWOPDTrainer.generalized_jsd_loss",
        (*_PAIR, "top_k", "add_tail", "num_items_in_batch"),
        _JSD,
    ),
    ("server_distillation", "ServerDistillationTrainer.compute_loss", _LOSS, _TwoHeads),
    ("sdpo", "SDPOTrainer._forward_logits", _FORWARD, Reader),
    ("sdpo", "compute_full_logit_self_distillation_loss", _SELF, _FullLogits),
    ("sdft", "SDFTTrainer._forward_logits", _FORWARD, Reader),
    ("sdft", "compute_full_logit_self_distillation_loss", _SELF, _FullLogits),
)


def replacements(own: HeadOptions) -> dict[Seam, Make]:
    made = {
        Seam(f"trl.experimental.{name}.{name}_trainer", attribute, parameters, _EXPERIMENTAL): make
        for name, attribute, parameters, make in _TABLE
    }
    return {**made, **fused_pair.replacements(own)}

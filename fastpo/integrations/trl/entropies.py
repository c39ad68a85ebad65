"""GRPO's `top_entropy_quantile`: tokens of one context are chosen together, as in TRL."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ties import lowest, reaches
from ..seams.seam import Make, Method, Seam

_VERSIONS = ("1.13", "1.14", "1.15", "1.16")
_ARGUMENTS = ("entropies", "mask", "threshold")


class _HighEntropies(Method):
    def __call__(self, trainer: Any, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        chosen = self.original(trainer, entropies, mask, threshold)
        least = trainer.accelerator.gather(lowest(entropies, chosen)).min()
        return mask.bool() & reaches(entropies, least)


def replacements() -> dict[Seam, Make]:
    name = "GRPOTrainer.get_high_entropy_mask"
    return {Seam("trl.trainer.grpo_trainer", name, _ARGUMENTS, _VERSIONS): _HighEntropies}

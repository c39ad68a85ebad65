"""Passes whose log-probabilities alone are used: TRL asks the policy's statistics of them, too.

The PEFT reference is the policy with its adapters off, and KTO's KL rows go through the policy:
entropy, mean logit and top-1 were computed there and thrown away.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ..seams.seam import Make, Method, Seam
from .head import light_passes
from .metrics.deferring import deferred, settle
from .objectives.base import ObjectiveTrainer

_VERSIONS = ("1.15", "1.16")
_LOSS = ("model", "inputs", "return_outputs")
_TRAINERS = {"dpo_trainer": "DPOTrainer", "kto_trainer": "KTOTrainer"}


class _Loss(Method):
    """While training, what runs without gradient beside the policy's own pass."""

    def __call__(self, trainer: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if isinstance(trainer, ObjectiveTrainer) and not trainer._fastpo.inside:
            return trainer._objective_loss(model, inputs, return_outputs)  # asked past it, by name
        training = trainer.model.training and torch.is_grad_enabled()
        light = light_passes() if training else nullcontext()
        with light, deferred(trainer, self.original):
            return self.original(trainer, model, inputs, return_outputs)


class _Log(Method):
    """Averages the metrics since the last one."""

    def __call__(self, trainer: Any, logs: Any, start_time: float | None = None) -> None:
        settle(trainer)
        self.original(trainer, logs, start_time)


class _Reference(Method):
    def __call__(self, trainer: Any, model: Any, inputs: Any) -> Any:
        with light_passes():
            return self.original(trainer, model, inputs)


def replacements() -> dict[Seam, Make]:
    made: dict[Seam, Make] = {}
    for module, trainer in _TRAINERS.items():
        place = f"trl.trainer.{module}"
        made[Seam(place, f"{trainer}._compute_loss", _LOSS, _VERSIONS)] = _Loss
        made[Seam(place, f"{trainer}.log", ("logs", "start_time"), _VERSIONS)] = _Log
        reference = f"{trainer}.compute_ref_log_probs"
        made[Seam(place, reference, ("model", "inputs"), _VERSIONS)] = _Reference
    return made

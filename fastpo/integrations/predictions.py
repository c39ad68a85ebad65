"""transformers' Trainer takes for predictions whatever a model returns beside its loss.

Of an attached model these are log-probabilities, where a `compute_metrics` and `predict()` expect
logits. So while a step of a Trainer asks for predictions labels are not scored.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from .seams.during import during
from .seams.seam import Method, Seam, replace_when_imported, restore

STEP = Seam(
    "transformers.trainer",
    "Trainer.prediction_step",
    ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    ("5",),
)

_asked: ContextVar[bool] = ContextVar("fastpo_predictions_asked", default=False)
_lock = threading.Lock()
_handles: WeakSet[Any] = WeakSet()


class _Step(Method):
    def __call__(
        self,
        trainer: Any,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        with during(_asked, not prediction_loss_only and "logits" not in (ignore_keys or ())):
            return self.original(trainer, model, inputs, prediction_loss_only, ignore_keys)


def watch(handle: Any) -> None:
    """Trainers' steps are looked at as long as there is a handle."""
    with _lock:
        if not _handles:
            replace_when_imported({STEP: _Step})
        _handles.add(handle)


def unwatch(handle: Any) -> None:
    with _lock:
        _handles.discard(handle)
        if not _handles:
            restore(STEP)


def check() -> None:
    """Called where labels are about to be scored."""
    if _asked.get():
        raise ValueError(
            "predictions: expected logits of a Trainer's model, got one with a fastpo head, which "
            "builds none for labels; evaluate after detach(), or with prediction_loss_only=True, "
            "or take log-probabilities by ignore_keys=['logits', 'past_key_values']"
        )

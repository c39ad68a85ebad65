"""What the constructor of a trainer did not get from `fastpo.patch`, in the log."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..seams.saying import say_once
from ..seams.seam import Make, Method, Seam
from .adapter import SHARES
from .objectives.base import ObjectiveTrainer

_INIT = Seam(
    "trl.trainer.base_trainer",
    "_BaseTrainer.__init__",
    ("args", "kwargs"),
    ("1.13", "1.14", "1.15", "1.16"),
)
_TRAIN = Seam(
    "transformers.trainer",
    "Trainer.train",
    ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    ("5",),
)


# Trainers that were built under a patch, and whether it had an objective.
_BUILT: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class _Init(Method):
    """`__init__` of what all trainers of TRL are."""

    def __init__(self, original: Any, taking: str) -> None:
        super().__init__(original)
        self.taking = taking

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.original(trainer, *args, **kwargs)
        _BUILT[trainer] = bool(self.taking)
        if self.taking and not isinstance(trainer, ObjectiveTrainer):
            why = f"it trains its own loss; patch(objective=...) is taken by {self.taking}"
            say_once(type(trainer).__name__, why)


class _Train(Method):
    """`Trainer.train`, of a trainer that was built before the patch, too."""

    def __init__(self, original: Any, objective: bool, sharing: bool | None) -> None:
        super().__init__(original)
        self.objective, self.sharing = objective, sharing

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_of_trl(trainer):
            has = isinstance(trainer, ObjectiveTrainer) or _BUILT.get(trainer, False)
            lacks = ["objective"] * (self.objective and not has)
            if self.sharing is not None and _has_own_head(trainer.model):
                lacks.append("shared_prompts" if self.sharing else "padding_free")
            if lacks:
                why = f"it was built before fastpo.patch, and trains without {' and '.join(lacks)}"
                say_once(type(trainer).__name__, why)
            if self.sharing is not None and _compiles(trainer):
                option = "shared_prompts" if self.sharing else "padding_free"
                what = f"{type(trainer).__name__} leaves its backbone uncompiled"
                say_once(what, f"{option} packs each batch before it")
        return self.original(trainer, *args, **kwargs)


def _compiles(trainer: Any) -> bool:
    """Its model as a whole? Regions that are compiled keep their padded batch, which says so."""
    plugin = trainer.accelerator.state.dynamo_plugin
    regions = getattr(plugin, "use_regional_compilation", False)
    return plugin.backend != "NO" and not regions


_BASE = _INIT.module, _INIT.name.partition(".")[0]


def _is_of_trl(trainer: Any) -> bool:
    return any((x.__module__, x.__name__) == _BASE for x in type(trainer).__mro__)


def _has_own_head(model: nn.Module) -> bool:
    """TRL's forward, put on when a trainer is built and not ours around it; other models are packed
    when they are called."""
    own = (vars(module).get("forward") for module in model.modules())
    return any(x is not None and _takes_head(x) and not hasattr(x, SHARES) for x in own)


def _takes_head(forward: Any) -> bool:
    # It says that it is the forward it wraps.
    return "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters


def replacements(taking: str, sharing: bool | None) -> dict[Seam, Make]:
    """taking: the trainers that take the patch's objective, "" if it has none."""
    if not taking and sharing is None:
        return {}
    return {
        _INIT: partial(_Init, taking=taking),
        _TRAIN: partial(_Train, objective=bool(taking), sharing=sharing),
    }

"""fastpo's objectives in TRL's DPOTrainer, KTOTrainer and GRPOTrainer, by name.

A trainer whose loss is one of fastpo's becomes, when it is built, a subclass of its own class.
TRL's `_compute_loss` still runs: policy pass, metrics and router loss are its own, only its loss
types are taken away and the objective's rows, computed from the same pass, added.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ....objectives._registry import entry_of
from ...seams.saying import inform
from ...seams.seam import Make, Method, Seam, kept, replace_when_imported
from ..sampled import SCORES
from .base import ObjectiveTrainer
from .needs import terms_of, weighted
from .policy import PolicyTrainer
from .setting import Setting
from .trainers import PairTrainer, SingleTrainer

VERSIONS = ("1.15", "1.16")
ARGUMENTS = (
    "model",
    "ref_model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "quantization_config",
    "peft_config",
)
_TEXTS = {
    "__init__": ARGUMENTS,
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_set_signature_columns_if_needed": (),
    "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    "compute_ref_log_probs": ("model", "inputs"),
    "_compute_loss": ("model", "inputs", "return_outputs"),
}
_ROLLOUTS = {
    "__init__": (
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "reward_processing_classes",
        "callbacks",
        "optimizers",
        "quantization_config",
        "peft_config",
        "tools",
        "rollout_func",
        "environment_factory",
    ),
    "_get_per_token_logps_and_entropies": SCORES,
    "get_high_entropy_mask": ("entropies", "mask", "threshold"),
    "_compute_loss": ("model", "inputs"),
}


def _seams(name: str, methods: Mapping[str, tuple[str, ...]]) -> dict[str, Seam]:
    module, trainer = f"trl.trainer.{name.lower()}_trainer", f"{name}Trainer"
    return {
        method: Seam(module, f"{trainer}.{method}", parameters, VERSIONS)
        for method, parameters in methods.items()
    }


_TRAINERS: tuple[tuple[type[ObjectiveTrainer], dict[str, Seam]], ...] = (
    (PairTrainer, _seams("DPO", _TEXTS)),
    (SingleTrainer, _seams("KTO", _TEXTS | {"_compute_kl_logps": ("model", "batch")})),
    (PolicyTrainer, _seams("GRPO", _ROLLOUTS)),
)


def taking(setting: Setting) -> str:
    """The trainers that take its objective; "" without one."""
    if setting.objective is None:
        return ""
    function = setting.bound()
    entry = entry_of(function)
    return ", ".join(
        seams["__init__"].name.split(".")[0]
        for mixin, seams in _TRAINERS
        if mixin.takes(function) and (entry is None or entry.family in mixin.families)
    )


def replacements(setting: Setting) -> dict[Seam, Make]:
    return {
        seams["__init__"]: functools.partial(_Init, setting=setting, mixin=mixin, seams=seams)
        for mixin, seams in _TRAINERS
    }


def check(setting: Setting) -> None:
    """ValueError for an objective that none of the trainers here takes."""
    entry = None if setting.objective is None else entry_of(setting.bound())
    families = [family for mixin, _ in _TRAINERS for family in mixin.families]
    if entry is None or entry.family in families:
        return
    hint = "; fastpo.GroupTrainer takes it as objective=" if entry.family == "groups" else ""
    raise ValueError(
        f"{entry.key}: expected an objective of {', '.join(families)}, got one of "
        f"{entry.family}{hint}"
    )


@contextmanager
def objectives_only(setting: Setting) -> Iterator[None]:
    """fastpo's objectives on TRL's own head, to compare heads."""
    with kept(*replacements(setting)):
        replace_when_imported(replacements(setting))
        yield


class _Init(Method):
    """`__init__` of a trainer: gives it another class first when its loss is one of fastpo's."""

    def __init__(
        self,
        original: Any,
        setting: Setting,
        mixin: type[ObjectiveTrainer],
        seams: Mapping[str, Seam],
    ) -> None:
        super().__init__(original)
        self.setting, self.mixin, self.seam = setting, mixin, seams["__init__"]
        for name, seam in seams.items():
            if name != "__init__":
                seam.read()

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        arguments = self.arguments(trainer, *args, **kwargs)
        config = arguments.get("args")
        setting, mixin = self.setting, self.mixin
        named = setting.objective is not None
        others = named and not mixin.takes(setting.bound())
        done = isinstance(trainer, ObjectiveTrainer) or self._has_own_loss(type(trainer))
        if others or done or not (named or config is not None):
            return self.original(trainer, *args, **kwargs)
        if config is None:
            raise ValueError("args: expected a config beside fastpo.patch(objective=...), got None")
        terms, own = terms_of(config, mixin.own, mixin.families, setting)
        if not terms:
            return self.original(trainer, *args, **kwargs)
        trainer.__class__ = self._with_objective(type(trainer))
        trainer.prepare_objective(terms, own, setting, arguments.get("train_dataset"))
        with trainer.configured(config):
            self.original(trainer, *args, **kwargs)
        trainer.finish_objective()
        theirs = [weighted(weight, f"TRL's {name}") for name, weight in own]
        inform(type(trainer).__name__, f"trains {' + '.join([*map(str, terms), *theirs])}")

    def _own(self, trainer: type) -> type:
        """The class of TRL's that this constructor is of; somebody may have put another on top."""
        name = self.seam.module, self.seam.name.removesuffix(".__init__")
        return next(x for x in trainer.__mro__ if (x.__module__, x.__qualname__) == name)

    def _has_own_loss(self, trainer: type) -> bool:
        """Is it another trainer of TRL's, on top of this one?"""
        above = trainer.__mro__[: trainer.__mro__.index(self._own(trainer))]
        return any(x.__module__.startswith("trl.") and "_compute_loss" in vars(x) for x in above)

    def _with_objective(self, trainer: type) -> type:
        """The class, with the mixin between TRL's class and what a script has made of it."""
        own = self._own(trainer)
        below = _named_as(own, (self.mixin, own))
        return below if trainer is own else _named_as(trainer, (trainer, below))


def _named_as(trainer: type, bases: tuple[type, ...]) -> type:
    named = {key: getattr(trainer, key) for key in ("__module__", "__doc__", "__qualname__")}
    return type(trainer.__name__, bases, named)

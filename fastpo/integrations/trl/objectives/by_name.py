"""fastpo's objectives in TRL's DPOTrainer and KTOTrainer, by name.

A trainer whose loss is one of fastpo's becomes, when it is built, a subclass of its own class.
TRL's `_compute_loss` still runs: policy pass, metrics and router loss are its own, only its loss
types are taken away and the objective's rows, computed from the same pass, added.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...seams.seam import Make, Method, Seam, kept, replace_when_imported
from .base import ObjectiveTrainer
from .needs import Setting, terms_of
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
_METHODS = {
    "__init__": ARGUMENTS,
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_set_signature_columns_if_needed": (),
    "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    "compute_ref_log_probs": ("model", "inputs"),
    "_compute_loss": ("model", "inputs", "return_outputs"),
}


def _seams(module: str, trainer: str, **more: tuple[str, ...]) -> dict[str, Seam]:
    return {
        method: Seam(f"trl.trainer.{module}", f"{trainer}.{method}", parameters, VERSIONS)
        for method, parameters in (_METHODS | more).items()
    }


DPO = _seams("dpo_trainer", "DPOTrainer")
KTO = _seams("kto_trainer", "KTOTrainer", _compute_kl_logps=("model", "batch"))


def replacements(setting: Setting) -> dict[Seam, Make]:
    return {
        DPO["__init__"]: functools.partial(_Init, setting=setting, mixin=PairTrainer, seams=DPO),
        KTO["__init__"]: functools.partial(_Init, setting=setting, mixin=SingleTrainer, seams=KTO),
    }


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
        self.setting, self.mixin = setting, mixin
        for name, seam in seams.items():
            if name != "__init__":
                seam.read()

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(self.original).bind(trainer, *args, **kwargs).arguments
        config = arguments.get("args")
        setting, mixin = self.setting, self.mixin
        if isinstance(trainer, ObjectiveTrainer) or (config is None and setting.objective is None):
            return self.original(trainer, *args, **kwargs)
        if config is None:
            raise ValueError("args: expected a config beside fastpo.patch(objective=...), got None")
        terms, own = terms_of(config, mixin.own, mixin.families, setting)
        if not terms:
            return self.original(trainer, *args, **kwargs)
        trainer.__class__ = with_objective(type(trainer), mixin)
        trainer.prepare_objective(terms, own, setting, arguments.get("train_dataset"))
        with trainer.configured(config):
            self.original(trainer, *args, **kwargs)
        trainer.finish_objective()


def with_objective(trainer: type, mixin: type) -> type:
    """The trainer's class with the mixin in front; it keeps its name."""
    named = {key: getattr(trainer, key) for key in ("__module__", "__doc__", "__qualname__")}
    return type(trainer.__name__, (mixin, trainer), named)

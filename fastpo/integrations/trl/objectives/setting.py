"""What `fastpo.patch` was told of an objective, checked before any trainer is built."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .... import objectives
from ....objectives._registry import quantities_of
from ....ops.walks.checks import check_integer, check_number

Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """What `patch(objective=...)` was told.

    references: models beside the reference, by the prefix of their quantities: "prev" -> a model,
        "history" -> a list of models. mixing: the m of the mixed_* quantities. alternatives: how
        many of the policy's best tokens another one is drawn from.
    """

    objective: str | Objective | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[str, Any] = field(default_factory=dict)
    reference_free: bool = False
    score_prompts: bool = False
    mixing: float | None = None
    alternatives: int = 5

    def __post_init__(self) -> None:
        if self.mixing is not None:
            check_number("mixing", self.mixing, "a finite number or None")
        check_integer("alternatives", self.alternatives, "an integer >= 1", lambda k: k >= 1)
        if self.objective is None:
            options = ("references", "reference_free", "score_prompts")
            given = [*self.hyperparameters, *(name for name in options if getattr(self, name))]
            if given:
                got = ", ".join(given)
                raise ValueError(
                    f"{got}: expected an option of fastpo.patch, or objective= with it, got neither"
                )
            return
        self._check_references()
        self.refuse_unheard([self.bound()])

    def refuse_unheard(self, functions: Iterable[Objective]) -> None:
        """ValueError for an option that changes no quantity of theirs; it may cost a pass."""
        names = list(dict.fromkeys(name for one in functions for name in quantities_of(one)))
        heard = {f"references[{name!r}]": f"{name}_*_logps" for name in self.references}
        heard |= {"reference_free": "*logratios"} if self.reference_free else {}
        heard |= {"mixing": "mixed_*_logps"} if self.mixing is not None else {}
        if self.alternatives != Setting.alternatives:
            heard["alternatives"] = "rejected_alternative_token_logps"
        for option, pattern in heard.items():
            if not fnmatch.filter(names, pattern):
                got = f"one of {', '.join(names)}" if names else "TRL's own"
                raise ValueError(f"{option}: expected an objective of {pattern}, got {got}")

    def _check_references(self) -> None:
        given: Any = self.references
        if not isinstance(given, Mapping):
            got = type(given).__name__
            raise ValueError(f"references: expected models by name, prev and history, got a {got}")
        unknown = set(self.references) - {"prev", "history"}
        if unknown:
            raise ValueError(f"references: expected prev and history, got {', '.join(unknown)}")
        for name in self.references:
            models = self.models(name)
            for one in models:
                if not isinstance(one, torch.nn.Module):
                    raise ValueError(f"references[{name!r}]: expected a model, got {one!r}")
            if not models or (name == "prev" and len(models) > 1):
                expected = "one model" if name == "prev" else "at least one model"
                raise ValueError(f"references[{name!r}]: expected {expected}, got {len(models)}")

    def models(self, name: str) -> list[Any]:
        """Of one name in `references`, in their order."""
        given = self.references[name]
        return list(given) if isinstance(given, list | tuple) else [given]

    def bound(self) -> Objective:
        """The objective with its hyperparameters, checked."""
        if isinstance(self.objective, str):
            return objectives.get(self.objective, **self.hyperparameters)
        if not callable(self.objective):
            got = type(self.objective).__name__
            raise ValueError(f"objective: expected a key or a function, got {got}")
        if self.hyperparameters:
            got = ", ".join(self.hyperparameters)
            raise ValueError(f"{got}: expected none, bind a function's own beforehand")
        return self.objective

"""Which loss a key names, and who computes it: TRL itself, or the objective of fastpo's table."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field
from typing import Any

from .errors import DemoError

# Key of fastpo.objectives -> loss_type of TRL's DPOTrainer.
TRL_LOSSES = {
    "dpo": "sigmoid",
    "hinge": "hinge",
    "ipo_norm": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust_dpo": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
    "dpo_norm": "sigmoid_norm",
}
# What TRL's DPOConfig calls the other hyperparameters. Its dpo ("sigmoid") ignores smoothing.
TRL_NAMES = {"label_smoothing": "label_smoothing", "tau": "discopop_tau"}
FAMILIES = ("pairs", "tokens")


@dataclass(frozen=True)
class Objective:
    """loss_type: TRL's name when TRL computes the loss; None when fastpo's objective does."""

    key: str
    loss_type: str | None
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    @property
    def trl_arguments(self) -> dict[str, Any]:
        """Arguments of DPOConfig. Beta also scales the rewards that TRL logs."""
        arguments = {"beta": self.hyperparameters.get("beta", 1.0)}
        if self.loss_type is not None:
            arguments["loss_type"] = [self.loss_type]
            for name, theirs in TRL_NAMES.items():
                if name in self.hyperparameters:
                    arguments[theirs] = self.hyperparameters[name]
        return arguments

    @property
    def title(self) -> str:
        trl = "" if self.loss_type is None else f', TRL\'s "{self.loss_type}"'
        values = ", ".join(f"{name} {value}" for name, value in self.hyperparameters.items())
        return f"{self.key}{trl}" + (f" ({values})" if values else "")


def choose(key: str, beta: float | None = None) -> Objective:
    """The objective of that key or alias with the table's defaults; DemoError lists the table."""
    from fastpo import objectives

    try:
        function = objectives.get(key)
    except ValueError:
        raise DemoError(_unknown(key)) from None
    entry = vars(function)["entry"]
    if entry.family not in FAMILIES:
        raise DemoError(f"--objective {key}: expected one for pairs, got one of {entry.family}")
    hyperparameters = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if beta is not None:
        if "beta" not in hyperparameters:
            raise DemoError(f"--beta: {entry.key} has none")
        hyperparameters["beta"] = beta
    chosen = Objective(entry.key, TRL_LOSSES.get(entry.key), hyperparameters)
    if chosen.loss_type is None:
        _check_quantities(chosen)
    return chosen


def bind(chosen: Objective) -> Any:
    from fastpo import objectives

    return objectives.get(chosen.key, **chosen.hyperparameters)


def _check_quantities(chosen: Objective) -> None:
    """Some objectives want more than two texts: scores, earlier models, a third text."""
    import torch

    from fastpo import TokenStats, quantities

    zeros = torch.zeros(2, 1)
    stats = TokenStats(logps=zeros, entropy=zeros, log_sum_sq_probs=zeros)
    available = quantities.padded(stats, zeros.bool(), ref=zeros)
    try:
        available.for_objective(bind(chosen))
    except ValueError as error:
        raise DemoError(
            f"--objective {chosen.key}: needs more than chosen and rejected answers: "
            f"{str(error).split(', got ')[0]}"
        ) from None


def usable() -> tuple[str, ...]:
    """The keys that can be trained on pairs alone."""
    from fastpo import objectives

    def trainable(key: str) -> bool:
        try:
            choose(key)
        except DemoError:
            return False
        return True

    return tuple(
        filter(trainable, (k for family in FAMILIES for k in objectives.available(family)))
    )


def _unknown(key: str) -> str:
    names = usable()
    near = difflib.get_close_matches(key, dict.fromkeys((*names, *TRL_LOSSES.values())))
    close = f"; close to it: {', '.join(near)}" if near else ""
    return f"--objective: expected one of {', '.join(names)}, got {key!r}{close}"

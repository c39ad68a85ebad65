"""The mixin for completions that the policy itself has drawn, in front of TRL's GRPOTrainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ....objectives._quantities import SHAPES
from ....objectives._registry import entry_of
from ....quantities import Quantities
from .base import ObjectiveTrainer, standing_in
from .columns import SINGLES
from .needs import Term, default_of, refuse_unheard, required_of, total
from .setting import Objective, Setting

_GIVEN = (
    "token_logps",
    "mask",
    "advantages",
    "old_token_logps",
    "ref_token_logps",
    "sampler_token_logps",
    "entropy",
    "is_weights",
)
# Options of GRPOConfig that weigh or leave out tokens, as `is_weights` do.
_WEIGHING = ("top_entropy_quantile", "off_policy_mask_threshold")
_OTHERS = ("use_adaptive_entropy", "use_liger_kernel")
_TOKEN_MODES = ("token_truncate", "token_mask")
_LEVELS = ("token", "sequence")  # of TRL


@dataclass
class _Step:
    """What TRL's `_compute_loss` has computed of the policy."""

    logps: Tensor | None = None  # [N, T] nats
    entropy: Tensor | None = None  # [N, T] nats
    aux_loss: Tensor | None = None  # 0-d, of a router
    weights: list[Tensor] = field(default_factory=list)  # masks, [N, T] or [N, 1]

    def scored(self, found: tuple[Tensor, Tensor, Tensor | None]) -> None:
        self.logps, self.entropy, self.aux_loss = found


def _noted(method: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        note(found)
        return found

    return noted


class PolicyTrainer(ObjectiveTrainer):
    """Objectives of policy gradient on TRL's rollouts and advantages, with TRL's metrics."""

    own = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
    families = ("policy_gradient",)
    sides = SINGLES

    @classmethod
    def takes(cls, function: Objective) -> bool:
        """Not one of another family, or a function of what only other trainers have.

        One of advantages, or of a name that nobody has, is no other trainer's: whatever else is
        wrong with it is an error.
        """
        entry = entry_of(function)
        if entry is not None:
            return entry.family in cls.families
        required = required_of(function)
        ours = "advantages" in required or not required <= SHAPES.keys()
        return ours or required.issubset(_GIVEN)

    def prepare_objective(
        self, terms: list[Term], own: list[tuple[str, float]], setting: Setting, dataset: Any
    ) -> None:
        super().prepare_objective(terms, own, setting, None)  # of which nothing is asked
        name = terms[0].name
        if foreign := self._fastpo.needs.required.difference(_GIVEN):
            raise ValueError(
                f"{name}: expected an objective of what GRPOTrainer has, {', '.join(_GIVEN)}; got "
                f"one of {min(foreign)}"
            )
        if setting.score_prompts:
            raise ValueError("score_prompts: expected False with GRPOTrainer, got True")

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """TRL loads its reference, and scores with it, where the objective asks for one."""
        self._refuse(config)
        reference = "ref_token_logps" in self._fastpo.needs.required
        # A beta of 0 would say that nobody asks for one.
        beta = (self._fastpo.terms[0].beta or 1.0) if reference else 0.0
        with standing_in(config, beta=beta, entropy_coef=0.0, loss_type="grpo"):
            yield

    def _refuse(self, config: Any) -> None:
        """Options of TRL's own losses that the objective would not hear of."""
        term = self._fastpo.terms[0]
        name = term.name
        refuse_unheard(config, term, term.parameters)
        options = {*_WEIGHING, *_OTHERS} & vars(config).keys()
        values = {x: getattr(config, x) for x in options}
        changed = {x: value for x, value in values.items() if value != default_of(config, x)}
        for option in _OTHERS:
            if changed.get(option):
                raise ValueError(f"{option}: expected False with {name}, got True")
        weighing = [option for option in _WEIGHING if option in changed]
        if config.use_vllm and config.vllm_importance_sampling_correction:
            weighing.append("vllm_importance_sampling_correction")
            mode = config.vllm_importance_sampling_mode
            if name == "vespo" and mode not in _TOKEN_MODES:  # as TRL: it sums over the tokens
                expected = " or ".join(_TOKEN_MODES)
                raise ValueError(
                    f"vllm_importance_sampling_mode: expected {expected} with vespo, got {mode}"
                )
        if weighing and "is_weights" not in self._fastpo.needs.names:
            option = weighing[0]
            raise ValueError(
                f"{option}: expected none with {name}, which has no is_weights, got "
                f"{getattr(config, option)}"
            )

    def _parameters(self) -> Mapping[str, Any]:
        return self._fastpo.terms[0].parameters

    def _objective_loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        trainer: Any = self
        step = _Step()
        kl = {"use_bias_correction_kl": bool(self._parameters().get("unbiased_kl"))}
        # As TRL calls them, whoever they are of.
        noting: dict[str, Callable[[Any], None]] = {
            "_get_per_token_logps_and_entropies": step.scored,
            "get_high_entropy_mask": step.weights.append,
            "get_off_policy_mask": step.weights.append,
        }
        methods = {name: _noted(getattr(self, name), note) for name, note in noting.items()}
        standing = {**self._trl_attributes(), **methods}
        with self._fastpo.running(), standing_in(self, **standing), standing_in(trainer.args, **kl):
            super()._compute_loss(model, inputs)  # type: ignore[misc]
        return self._fastpo_loss(step, inputs)

    _compute_loss = _objective_loss

    def _fastpo_loss(self, step: _Step, inputs: Mapping[str, Any]) -> Tensor:
        trainer: Any = self
        training = trainer.model.training
        steps = trainer.current_gradient_accumulation_steps if training else 1
        options: dict[str, Any] = {}
        free = {name for name, value in self._parameters().items() if value is None}
        if "max_length" in free:
            options["max_length"] = trainer.max_completion_length
        if "num_tokens" in free:
            # TRL's count is that of a batch of generations: of all its steps, of all processes.
            tokens = inputs["num_items_in_batch"] / trainer.accelerator.num_processes
            options["num_tokens"] = tokens / (trainer.args.steps_per_generation if training else 1)
        loss = total(self._fastpo.terms, self._quantities(step, inputs), **options)
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * step.aux_loss
        return loss / steps

    def _trl_attributes(self) -> dict[str, Any]:
        """TRL's metrics of clipped ratios are those of our bounds, if we have any; its loss nobody
        reads."""
        known = self._parameters()
        low, high, level = (known.get(x) for x in ("epsilon_low", "epsilon_high", "level"))
        found: dict[str, Any] = {"loss_type": "sapo" if low is None else "grpo"}
        if low is not None:
            found |= {"epsilon_low": low, "epsilon_high": low if high is None else high}
        if level is not None:
            found["importance_sampling_level"] = _LEVELS[level != "token"]
        return found

    def _quantities(self, step: _Step, inputs: Mapping[str, Any]) -> Quantities:
        trainer: Any = self
        given = {
            "token_logps": step.logps,
            "mask": (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool(),
            "advantages": inputs["advantages"],
            "old_token_logps": inputs.get("old_per_token_logps"),
            "ref_token_logps": inputs.get("ref_per_token_logps"),
            "sampler_token_logps": inputs.get("sampling_per_token_logps"),
            "entropy": step.entropy,
        }
        weights = list(step.weights)
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            weights.append(inputs["importance_sampling_ratio"])
        if weights:
            given["is_weights"] = functools.reduce(lambda a, b: a * b, weights)
        return Quantities(given)

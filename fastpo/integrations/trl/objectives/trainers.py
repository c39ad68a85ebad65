"""The two mixins: pairs in TRL's DPOTrainer, single responses in its KTOTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ....ops.stats import TokenStats
from ....quantities import Quantities, padded
from .base import Texts, TextTrainer, standing_in
from .columns import PAIRS, SINGLES
from .passes import Pass, alternatives, mixed, token_kl

# Options of DPOConfig that are transforms here: default, transform.
_TRANSFORMS = {
    "ld_alpha": (None, "ld_logps"),
    "use_weighting": (False, "wpo_weights"),
    "f_divergence_type": ("reverse_kl", "f_divergence"),
}


_SUMS = ("ref_chosen_logps", "ref_rejected_logps")
# Of a batch of KTOTrainer: what is no input of a model, or is handed on by TRL. "KL_" starts those
# of the mismatched rows, token types among them.
_ROWS = ("input_ids", "attention_mask", "completion_mask", "label", "ref_logps", "ref_KL_logps")
_KL = "KL_"


class PairTrainer(TextTrainer):
    """Objectives of pairs and of their tokens, in front of DPOTrainer."""

    own = (
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
        "sigmoid_norm",
    )
    families = ("pairs", "tokens")
    sides = PAIRS

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """TRL's head also returns log Σ p² when WPO's weights are asked for."""
        for name, (default, transform) in _TRANSFORMS.items():
            if getattr(config, name) != default:
                raise ValueError(
                    f"{name}: expected {default} with {self._fastpo.terms[0].name}, got "
                    f"{getattr(config, name)}; fastpo.objectives.compose has {transform}"
                )
        config.use_weighting = self._fastpo.needs.asks("log_sum_sq_probs")
        try:
            with super().configured(config):
                yield
        finally:
            config.use_weighting = False
        vars(self)["use_weighting"] = False

    def _objective_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        with self._fastpo.running():
            return self._fastpo_loss(model, inputs, return_outputs)

    _compute_loss = _objective_loss

    def _fastpo_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        own, columns, texts = self._split(inputs)
        given: dict[str, Any] = dict(columns)
        pairs = len(own["input_ids"]) // 2
        zeros = torch.zeros(pairs, dtype=torch.float32, device=own["input_ids"].device)
        reference, sums = None, (zeros, zeros)
        if self._runs_reference(inputs):
            reference, sums = self._reference(own, texts)
            tokens = reference.logps.chunk(len(reference.logps) // pairs)
            given |= {f"ref_{side}_token_logps": x for side, x in zip(PAIRS, tokens, strict=False)}
        elif "ref_chosen_logps" in own:
            given |= {name: own[name] for name in _SUMS if name in own}
        own = dict(zip(_SUMS, sums, strict=True)) | own
        policy = Pass(model, list(texts.values()))
        with standing_in(self, **self._trl_attributes()):
            result = super()._compute_loss(policy, own, return_outputs)  # type: ignore[misc]
        given |= self._beside(policy, reference, pairs) | self._texts(
            policy, reference, texts, pairs
        )
        given |= self._other_models(own)
        return self._add(result, self._quantities(policy, given, 2 * pairs))

    def _trl_attributes(self) -> dict[str, Any]:
        """TRL's own loss types stay, on reference sums that are given; rewards get our beta."""
        attributes = {
            "loss_types": [name for name, _ in self._fastpo.own_terms],
            "loss_weights": [weight for _, weight in self._fastpo.own_terms],
            "precompute_ref_logps": True,
        }
        if self._fastpo.own_terms:
            return attributes
        return attributes | {"beta": self._fastpo.terms[0].beta}

    def _quantities(self, policy: Pass, given: Mapping[str, Any], rows: int) -> Quantities:
        assert policy.stats is not None
        stats = TokenStats(*(None if x is None else x[:rows] for x in policy.stats))
        free = self._fastpo.setting.reference_free
        return padded(stats, policy.mask[:rows], reference_free=free) | given

    def _beside(self, policy: Pass, reference: Pass | None, pairs: int) -> dict[str, Any]:
        """What takes another walk over the vocabulary, when asked for."""
        found = {}
        if reference is not None:
            found["token_kl"] = token_kl(policy, reference)
            if self._fastpo.setting.mixing is not None:
                tokens = mixed(policy, reference, self._fastpo.setting.mixing)
                found["logps"] = lambda: tokens().sum(1)
        by_name: dict[str, Any] = {}
        for kind, compute in found.items():
            prefix = "mixed_" if kind == "logps" else ""
            for i, side in enumerate(PAIRS):
                by_name[f"{prefix}{side}_{kind}"] = _part(compute, i * pairs, (i + 1) * pairs)
        drawn = alternatives(policy, self._fastpo.setting.alternatives)
        by_name["rejected_alternative_token_logps"] = _part(drawn, pairs, 2 * pairs)
        return by_name

    def _texts(
        self, policy: Pass, reference: Pass | None, texts: Texts, pairs: int
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        start = 2 * pairs
        for text, rows in texts.items():
            part = slice(start, start + len(rows["input_ids"]))
            start = part.stop
            found[f"{text}_logps"] = policy.logps[part].sum(1)
            found[f"{text}_lengths"] = policy.mask[part].sum(1)
            if reference is not None:
                found[f"ref_{text}_logps"] = reference.logps[part].sum(1)
        return found

    def _other_models(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """`prev_*` [B] of one model, `history_*` [K, B] of several."""
        trainer: Any = self
        found = {}
        for name, models in self._fastpo.other_models.items():
            sums = [trainer.compute_ref_log_probs(model, own) for model in models]
            for i, side in enumerate(PAIRS):
                each = [pair[i] for pair in sums]
                found[f"{name}_{side}_logps"] = torch.stack(each) if name == "history" else each[0]
        return found


def _part(compute: Any, start: int, stop: int) -> Any:
    return lambda: compute()[start:stop]


class SingleTrainer(TextTrainer):
    """Objectives of single responses, in front of KTOTrainer."""

    own = ("kto", "apo_zero_unpaired")
    families = ("singles",)
    sides = SINGLES

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """TRL estimates the KL of mismatched rows for every name but this one."""
        asks = "kl_logratios" in self._fastpo.needs.names
        loss_type = "kto" if asks else "apo_zero_unpaired"
        with standing_in(config, loss_type=loss_type), super().configured(config):
            yield

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """TRL's asks with ids and masks alone, as it is for datasets of texts."""
        if isinstance(model, Pass):  # of a batch, from which columns have been taken
            model.model = _BesideIds(model.model, inputs)
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def _compute_kl_logps(self, model: Any, batch: Any) -> Any:
        plain = model.model if isinstance(model, Pass) else model
        self._fastpo.kl_logps = super()._compute_kl_logps(plain, batch)  # type: ignore[misc]
        return self._fastpo.kl_logps

    def _objective_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        with self._fastpo.running():
            return self._fastpo_loss(model, inputs, return_outputs)

    _compute_loss = _objective_loss

    def _fastpo_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        trainer: Any = self
        own, columns, texts = self._split(inputs)
        given: dict[str, Any] = {**columns, "labels": own["label"].bool()}
        reference = None
        if self._runs_reference(inputs):
            reference, (sums, kl) = self._reference(own, texts)
            given["ref_token_logps"] = reference.logps
            own = {"ref_logps": sums} | ({} if kl is None else {"ref_KL_logps": kl}) | own
        elif "ref_logps" in own:
            given["ref_logps"] = own["ref_logps"]
        zeros = torch.zeros_like(own["label"], dtype=torch.float32)
        own = {"ref_logps": zeros} | own
        if self._fastpo.setting.reference_free:
            own["ref_KL_logps"] = zeros
        policy = Pass(model, list(texts.values()))
        zero = {
            "desirable_weight": 0.0,
            "undesirable_weight": 0.0,
            "beta": self._fastpo.terms[0].beta,
        }
        standing = {"loss_type": "apo_zero_unpaired", "precompute_ref_logps": True, **zero}
        with standing_in(self, **standing):
            result = super()._compute_loss(policy, own, return_outputs)  # type: ignore[misc]
        if trainer.calculate_KL:
            mean = (self._fastpo.kl_logps - own["ref_KL_logps"]).mean()
            given["kl_logratios"] = trainer.accelerator.gather_for_metrics(mean).mean().view(1)
        if reference is not None:
            divergence = token_kl(policy, reference)
            given["forward_kl"] = lambda: divergence().sum(1)
        free = self._fastpo.setting.reference_free
        q = padded(policy.stats, policy.mask, sides=("",), reference_free=free) | given
        return self._add(result, q)


class _BesideIds:
    """A model, called with what else the batch holds of the rows in question, such as images."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        self.model = model
        mismatched = {k.removeprefix(_KL): x for k, x in inputs.items() if k.startswith(_KL)}
        self.kl_ids = mismatched.get("input_ids")
        self.own = {k: x for k, x in inputs.items() if k not in _ROWS and not k.startswith(_KL)}
        self.kl = self.own | {k: x for k, x in mismatched.items() if k not in _ROWS}

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)  # of an instance that is being made
        return getattr(self.model, name)

    def __call__(self, **arguments: Any) -> Any:
        beside = self.kl if arguments["input_ids"] is self.kl_ids else self.own
        return self.model(**beside | arguments)

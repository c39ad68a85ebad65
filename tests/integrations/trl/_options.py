"""Cases for `test_trl_options.py`: what scripts ask of TRL's trainers beside the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import _tiny as tiny
import _trainers
from torch.nn import functional as F

from fastpo.integrations.trl.objectives.trainers import PairTrainer

Changes = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run of a trainer, made once with the patch and once without."""

    prefix: str  # TRL's: DPO for DPOTrainer and DPOConfig
    changes: Changes = field(default_factory=dict)  # of the config
    lora: bool = False
    evaluated: bool = False  # on held-out rows, after steps 2 and 3
    arguments: dict[str, Any] = field(default_factory=dict)  # of the trainer
    data: Any = None  # makes the rows, where they are not the trainer's usual ones

    @property
    def full_logits(self) -> bool:
        """TRL recomputes the logits it hands to the caller's metrics."""
        return "compute_metrics" in self.arguments

    def rows(self) -> Any:
        return (self.data or _trainers.DATA[self.prefix])()

    def build(self, folder: Any, path: Any) -> Any:
        rows, given, changes = self.rows(), dict(self.arguments), dict(self.changes)
        if self.lora:
            given["peft_config"] = _trainers.lora()
        if self.evaluated:
            given["eval_dataset"] = rows.select(range(4))
            changes |= {"eval_strategy": "steps", "eval_steps": 2}
            changes["per_device_eval_batch_size"] = 2
        if rows.column_names == ["prompt"]:
            given["reward_funcs"] = _trainers.reward
        return _trainers.build(self.prefix, folder, str(path), rows, changes, **given)


def spread(predictions: Any) -> dict[str, float]:
    """A metric of the logits themselves; the evaluation loop pads them with -100."""
    logits = predictions.predictions
    return {"spread": float(logits[logits != -100].std())}


def second_best(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss of the script's own."""
    logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / (targets != -100).sum()


METRICS = {"compute_metrics": spread}
SMOOTHED = {"label_smoothing": 0.1}
ACCUMULATED = {"gradient_accumulation_steps": 2}
CHECKPOINTED = {"gradient_checkpointing": True}
SYNCHRONISED = {"sync_ref_model": True, "ref_model_sync_steps": 1}
PRECOMPUTED = {"precompute_ref_log_probs": True}
SAMPLED = {"num_generations": 2, "max_completion_length": 8}
# From the second pass over a batch on, the policy is no longer the one that sampled it.
TWICE = {**SAMPLED, "num_iterations": 2}
WEIGHTED = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
WEIGHTS = {"desirable_weight": 0.7, "undesirable_weight": 1.3}


def _f_divergence(name: str, **more: Any) -> Changes:
    return {"f_divergence_type": name, **more}


DPO = {
    **{f"loss_{name}": Case("DPO", {"loss_type": [name], **SMOOTHED}) for name in PairTrainer.own},
    "losses_weighted": Case("DPO", {**WEIGHTED, **ACCUMULATED}, evaluated=True),
    "forward_kl": Case("DPO", _f_divergence("forward_kl"), evaluated=True),
    "js_ipo": Case("DPO", _f_divergence("js_divergence", loss_type=["ipo"], **PRECOMPUTED)),
    "alpha": Case("DPO", _f_divergence("alpha_divergence", f_alpha_divergence_coef=0.7), lora=True),
    "ld": Case("DPO", {"ld_alpha": 0.4, **SYNCHRONISED}),
    "ld_lora": Case("DPO", {"ld_alpha": 0.4, **CHECKPOINTED}, lora=True, evaluated=True),
    "wpo": Case("DPO", {"use_weighting": True, "loss_type": ["sigmoid", "ipo"]}, evaluated=True),
    "wpo_lora": Case("DPO", {"use_weighting": True, **PRECOMPUTED, **ACCUMULATED}, lora=True),
    "precomputed": Case(
        "DPO", {**PRECOMPUTED, "precompute_ref_batch_size": 3}, evaluated=True, arguments=METRICS
    ),
    "metrics": Case("DPO", evaluated=True, arguments=METRICS),
    "metrics_lora": Case("DPO", lora=True, evaluated=True, arguments=METRICS),
    "checkpointing": Case("DPO", {**CHECKPOINTED, **ACCUMULATED}),
    "truncated": Case("DPO", {"max_length": 12, "truncation_mode": "keep_end"}),
}
KTO = {
    "kto": Case("KTO", {**WEIGHTS, **ACCUMULATED}, evaluated=True),
    "lora": Case("KTO", WEIGHTS, lora=True, evaluated=True),
    "precomputed": Case("KTO", PRECOMPUTED, evaluated=True, arguments=METRICS),
    "synchronised": Case("KTO", {**SYNCHRONISED, **CHECKPOINTED}),
    "unpaired": Case("KTO", {"loss_type": "apo_zero_unpaired", **WEIGHTS}, evaluated=True),
    "unpaired_lora": Case(
        "KTO", {"loss_type": "apo_zero_unpaired", **PRECOMPUTED, **CHECKPOINTED}, lora=True
    ),
    "metrics": Case("KTO", {"max_length": 12}, evaluated=True, arguments=METRICS),
}
# TRL 1.13 and 1.14 fail with their default, `chunked_nll`, where the loss is not their own.
NLL = {"loss_type": "nll"}
SMOOTH = {"label_smoothing_factor": 0.1, **NLL}
PACKED = {"packing": True, "max_length": 16}
SFT = {
    "nll": Case("SFT", ACCUMULATED, evaluated=True),
    "chunked": Case("SFT", {"loss_type": "chunked_nll"}),
    "lora": Case("SFT", {**CHECKPOINTED, **ACCUMULATED}, lora=True, evaluated=True),
    "metrics": Case("SFT", evaluated=True, arguments=METRICS),
    "dft": Case("SFT", {"loss_type": "dft", **ACCUMULATED}, evaluated=True),
    "dft_lora": Case("SFT", {"loss_type": "dft", **CHECKPOINTED}, lora=True),
    "wrapped": Case(
        "SFT", {**PACKED, "packing_strategy": "wrapped"}, evaluated=True, arguments=METRICS
    ),
    "best_fit": Case("SFT", {**PACKED, "packing_strategy": "bfd"}, evaluated=True),
    "best_fit_split": Case("SFT", {**PACKED, "packing_strategy": "bfd_split"}),
    "padding_free": Case("SFT", {"padding_free": True, "max_length": None}),
    "completion_only": Case("SFT", evaluated=True, data=tiny.completions),
    "prompt_too": Case("SFT", {"completion_only_loss": False}, data=tiny.completions),
    "assistant_only": Case("SFT", {"assistant_only_loss": True}, evaluated=True),
    "smoothed": Case("SFT", {**SMOOTH, **ACCUMULATED}, evaluated=True),
    "smoothed_lora": Case("SFT", {**SMOOTH, **CHECKPOINTED}, lora=True),
    "own_loss": Case("SFT", NLL, evaluated=True, arguments={"compute_loss_func": second_best}),
    "noise": Case("SFT", {"neftune_noise_alpha": 5.0}),
}
GRPO = {
    "grpo": Case("GRPO", {**TWICE, "loss_type": "grpo", "beta": 0.1, **ACCUMULATED}, lora=True),
    "dapo": Case("GRPO", TWICE),
    "bnpo": Case("GRPO", {**TWICE, "loss_type": "bnpo", "delta": 1.5, **CHECKPOINTED}),
    "dr_grpo": Case(
        "GRPO",
        {**SAMPLED, "loss_type": "dr_grpo", "top_entropy_quantile": 0.5},
        evaluated=True,
    ),
    "luspo": Case("GRPO", {**TWICE, "loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "cispo": Case(
        "GRPO", {**TWICE, "loss_type": "cispo", "epsilon_high": 5.0, "entropy_coef": 0.1}
    ),
    "sapo": Case("GRPO", {**TWICE, "loss_type": "sapo", "beta": 0.1, **SYNCHRONISED}),
    "vespo": Case("GRPO", {**TWICE, "loss_type": "vespo", "temperature": 0.8}),
    "entropy_lora": Case(
        "GRPO",
        {**TWICE, "top_entropy_quantile": 0.5, "entropy_coef": 0.1, **CHECKPOINTED},
        lora=True,
    ),
    "biased_kl": Case(
        "GRPO", {**TWICE, "beta": 0.2, "use_bias_correction_kl": False, "scale_rewards": False}
    ),
}
OTHERS = {
    "gmpo": Case("GMPO", {**TWICE, "beta": 0.1}),
    "gmpo_lora": Case("GMPO", SAMPLED, lora=True),
    "rloo": Case("RLOO", {**TWICE, "beta": 0.1, **ACCUMULATED}, evaluated=True),
    "rloo_lora": Case("RLOO", {**TWICE, "normalize_advantages": True, **CHECKPOINTED}, lora=True),
    "rloo_clipped": Case(
        "RLOO", {**SAMPLED, "beta": 0.0, "reward_clip_range": (1.0, 5.0), "temperature": 0.8}
    ),
}
CASES = {
    **{f"dpo_{name}": case for name, case in DPO.items()},
    **{f"kto_{name}": case for name, case in KTO.items()},
    **{f"sft_{name}": case for name, case in SFT.items()},
    **{f"grpo_{name}": case for name, case in GRPO.items()},
    **OTHERS,
}

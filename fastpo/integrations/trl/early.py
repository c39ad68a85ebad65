"""TRL 1.13 and 1.14, whose stable trainers build logits, chunked only on `use_liger_kernel`.

The logits of policy and reference stay a promise while DPO, KTO, SFT, GRPO and RLOO read them.
What these versions compute in chunks runs through the same head as the fused head of later ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.shards.gathered import HeadOptions, score
from ..lazy.logits import promise_of
from ..seams.saying import say_once
from ..seams.seam import Make, Method, Replacement, Seam
from .head import GATHER, FusedHead, WithOptions, unserved
from .logits import (
    LOSS,
    SELECT,
    SELECT_BOTH,
    Reader,
    Row,
    Selected,
    SelectedWithEntropy,
    real_outputs,
    seams,
)
from .objectives.by_name import ARGUMENTS as INIT
from .objectives.by_name import VERSIONS as OBJECTIVES
from .objectives.trainers import PairTrainer, SingleTrainer
from .sampled import SCORES


class _TwoOutputs(FusedHead):
    """The head of these versions knows no `outputs`: log-probabilities and entropy it is."""

    def scored(  # type: ignore[override]
        self,
        last_hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor | None, ...]:  # each [N]
        return super().scored(
            last_hidden,
            weight,
            bias,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping,
            logit_scale,
            ("entropy",),
        )[:2]


class _ChunkedLoss(WithOptions):
    """`_chunked_cross_entropy_loss`, what SFT minimises by default."""

    def __call__(
        self, hidden_states: Tensor, lm_head_weight: Tensor, *args: Any, **more: Any
    ) -> Any:
        bias = more.get("lm_head_bias")
        why = unserved(hidden=hidden_states, weight=lm_head_weight, bias=bias)
        if why is None:
            return self.loss(hidden_states, lm_head_weight, *args, **more)
        say_once("TRL keeps its own loss", why)
        return self.original(hidden_states, lm_head_weight, *args, **more)

    def loss(
        self,
        hidden_states: Tensor,  # [B, T, H]
        lm_head_weight: Tensor,  # [V, H]
        chunk_size: int,
        labels: Tensor | None = None,  # [B, T]
        shift_labels: Tensor | None = None,  # [B, T]
        num_items_in_batch: Tensor | int | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        lm_head_bias: Tensor | None = None,  # [V]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, number of correct tokens, summed entropy, number of tokens."""
        hidden, targets = _scored(hidden_states, labels, shift_labels)
        options = HeadOptions(
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=("logps", "entropy", "is_top1"),
            budget=self.own.budget,
            backend=self.own.backend,
        )
        gather = GATHER.current()
        stats = score(hidden, lm_head_weight, lm_head_bias, targets, options, gather)
        assert stats.logps is not None and stats.entropy is not None and stats.is_top1 is not None
        tokens = torch.tensor(len(targets), dtype=torch.int64, device=hidden.device)
        divisor = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if isinstance(divisor, Tensor):
            divisor = divisor.to(hidden.device)
        loss = -stats.logps.sum() / divisor
        return loss, stats.is_top1.sum(), stats.entropy.detach().sum(), tokens


def _scored(
    hidden: Tensor,  # [B, T, H]
    labels: Tensor | None,  # [B, T]
    shift_labels: Tensor | None,  # [B, T]
) -> tuple[Tensor, Tensor]:  # [N, H], [N]
    """The positions whose next token counts."""
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels: expected labels or shift_labels, got neither")
        hidden, shift_labels = hidden[..., :-1, :], labels[..., 1:]
    targets = shift_labels.flatten()
    rows = (targets != -100).nonzero().squeeze(1)
    return hidden.flatten(0, -2).index_select(0, rows), targets.index_select(0, rows)


class _WithReference(Reader):
    """A method of DPO's and KTO's trainers that also calls the reference model."""

    others = ("ref_model",)


class _ComputeLoss(Reader):
    """SFT's `compute_loss`: always asks for outputs, and a plain evaluation drops their logits."""

    def __call__(
        self,
        trainer: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        dropped = inputs.get("_prediction_loss_only")
        with self.lazy(trainer, model):
            found = self.original(trainer, model, inputs, return_outputs, num_items_in_batch)
            return found if dropped else real_outputs(found)


class _SelectedOnly(Replacement):
    """1.13's `selective_log_softmax`, without temperature and mask."""

    def __call__(self, logits: Any, index: Tensor) -> Any:
        promise = promise_of(logits) if index.ndim == logits.ndim - 1 else None
        return self.original(logits, index) if promise is None else promise.logps(index)


class _Entropy(Replacement):
    """`entropy_from_logits`; with gradient where the caller wants one."""

    def __call__(self, logits: Any, chunk_size: int = 128) -> Any:
        promise = promise_of(logits)
        if promise is None:
            return self.original(logits, chunk_size)
        return promise.stats(torch.zeros_like(promise.rows), "entropy").entropy


class _OwnLoss(Method):
    """The fused losses of 1.13's `use_liger_kernel`, which never build all logits."""

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        say_once(f"{type(trainer).__name__} keeps its own fused loss", "use_liger_kernel is True")
        return self.original(trainer, *args, **kwargs)


class _NoObjectives(Method):
    """`__init__` of a trainer whose loss cannot be one of fastpo's."""

    def __init__(self, original: Any, own: tuple[str, ...]) -> None:
        super().__init__(original)
        self.own = own

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        config = self.arguments(trainer, *args, **kwargs).get("args")
        asked = getattr(config, "loss_type", None) or ()
        names = [asked] if isinstance(asked, str) else asked
        if not set(names) <= set(self.own):
            raise RuntimeError(
                f"loss_type: expected {' or '.join(self.own)} with this trl, got {asked!r}; "
                f"fastpo's objectives work with trl {' and '.join(OBJECTIVES)}"
            )
        self.original(trainer, *args, **kwargs)


_EARLY = ("1.13", "1.14")
_13, _14 = _EARLY[:1], _EARLY[1:]
_TRAINERS = ("dpo", "kto", "grpo", "rloo")
_APPLY = (
    "last_hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
)
_CHUNKED_LOSS = (
    "hidden_states",
    "lm_head_weight",
    "chunk_size",
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "logit_scale",
    "final_logit_softcapping",
    "lm_head_bias",
)
_FORWARDED = ("model", "args", "batch_size", "compute_aux_loss", "kwargs")
_SCORE, _BOTH_LOGPS = "_get_per_token_logps_and_entropies", "selective_log_softmax_and_entropy"
_LOGPS, _ENTROPY = "selective_log_softmax", "entropy_from_logits"
_STABLE: tuple[Row, ...] = (
    (_EARLY, "dpo", "DPOTrainer._compute_loss", LOSS, _WithReference),
    (_EARLY, "dpo", "DPOTrainer.compute_ref_log_probs", LOSS[:2], Reader),
    (_13, "dpo", "DPOTrainer._compute_loss_liger", LOSS, _OwnLoss),
    (_EARLY, "kto", "KTOTrainer._compute_loss", LOSS, _WithReference),
    (_EARLY, "kto", "KTOTrainer.compute_ref_log_probs", LOSS[:2], Reader),
    (_13, "kto", "KTOTrainer._compute_loss_liger", LOSS, _OwnLoss),
    (_13, "grpo", f"GRPOTrainer.{_SCORE}", SCORES, Reader),
    (_14, "grpo", f"GRPOTrainer.{_SCORE}", _FORWARDED, Reader),
    (_13, "grpo", "GRPOTrainer.compute_liger_loss", ("unwrapped_model", "inputs"), _OwnLoss),
    (_EARLY, "rloo", f"RLOOTrainer.{_SCORE}", SCORES, Reader),
    (_EARLY, "sft", "SFTTrainer.compute_loss", (*LOSS, "num_items_in_batch"), _ComputeLoss),
    (_EARLY, "sft", _ENTROPY, ("logits", "chunk_size"), _Entropy),
    *((_13, name, _ENTROPY, ("logits", "chunk_size"), _Entropy) for name in _TRAINERS),
    *((_13, name, _LOGPS, SELECT[:2], _SelectedOnly) for name in (*_TRAINERS, "sft")),
    *((_14, name, _LOGPS, SELECT, Selected) for name in (*_TRAINERS, "sft")),
    *((_14, name, _BOTH_LOGPS, SELECT_BOTH, SelectedWithEntropy) for name in _TRAINERS),
)
_EXPERIMENTAL: tuple[Row, ...] = (
    *((_13, name, _LOGPS, SELECT[:2], _SelectedOnly) for name in ("cpo", "orpo", "tpo", "a2po")),
    (_13, "tpo", _ENTROPY, ("logits", "chunk_size"), _Entropy),
)
_OWN_LOSSES = {"dpo": PairTrainer, "kto": SingleTrainer}


def replacements(own: HeadOptions) -> dict[Seam, Make]:
    chunked: tuple[Row, ...] = (
        (
            _EARLY,
            "sft",
            "_chunked_cross_entropy_loss",
            _CHUNKED_LOSS,
            partial(_ChunkedLoss, own=own),
        ),
        *(
            (
                _EARLY,
                name,
                f"{name.upper()}Trainer.__init__",
                INIT,
                partial(_NoObjectives, own=mixin.own),
            )
            for name, mixin in _OWN_LOSSES.items()
        ),
    )
    return seams((*_STABLE, *chunked), "trl.trainer") | seams(_EXPERIMENTAL)


def heads(own: HeadOptions) -> dict[Seam, Make]:
    """The chunked head, in the module it is from and by name in those of 1.14's trainers."""
    apply = {"utils": _EARLY, "dpo_trainer": _14, "kto_trainer": _14, "grpo_trainer": _14}
    return {
        Seam(
            f"trl.trainer.{module}", "_ChunkedLogProbFunction", _APPLY, versions, "forward"
        ): partial(_TwoOutputs, own=own)
        for module, versions in apply.items()
    }

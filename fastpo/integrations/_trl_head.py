"""TRL's fused head, taken over at the one name all its stable trainers share.

`trl.trainer.utils.add_fused_lm_head` finds the valid positions, gathers what FSDP, ZeRO-3 or PEFT
hide, and hands [N, H] hidden states to `_ChunkedLogProbFunction.apply`, which it looks up in its
module at every call. DPO, KTO, SFT, GRPO and RLOO scripts and their metrics stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_logps import TokenStats
from ._head import HeadOptions, score
from ._seam import Replacement, Seam

_MODULE = "trl.trainer.utils"
_VERSIONS = ("1.15", "1.16")
HEAD = Seam(
    _MODULE,
    "_ChunkedLogProbFunction",
    (
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
    _VERSIONS,
    member="forward",
)
# 1.15 compacts everywhere and has no such switch.
COMPACT = Seam(_MODULE, "_use_triton", ("device",), _VERSIONS, optional=True)
GATHER = Seam(_MODULE, "maybe_gather_lm_head_ctx", ("params",), _VERSIONS)

# TRL's names in the order of its results.
_OUTPUTS = {
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}


@dataclass(frozen=True)
class HeadCall:
    """What one call of the head was given, and what came out, for quantities TRL does not know."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]
    options: HeadOptions
    stats: TokenStats


@dataclass(frozen=True)
class Recording:
    """The head calls of a block, and the outputs they compute beside those TRL asks for."""

    outputs: tuple[str, ...]
    calls: list[HeadCall] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("fastpo_recording", default=None)


@contextmanager
def recording(*outputs: str) -> Iterator[Recording]:
    """Every call of a fused head in the block also computes `outputs` and is remembered."""
    record = Recording(outputs)
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


class FusedHead(Replacement):
    """`linear_logps` behind the `apply` of TRL's autograd function."""

    def __init__(self, original: Any, budget: int | None, backend: str | None) -> None:
        super().__init__(original)
        self.budget, self.backend = budget, backend

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,  # TRL's tile width; fastpo chooses its own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:  # each [N], None where not requested
        unknown = set(outputs) - set(_OUTPUTS)
        if unknown:
            raise RuntimeError(
                f"outputs: expected a tuple of {', '.join(_OUTPUTS)}, got {tuple(outputs)}; "
                f"fastpo works with trl {' and '.join(_VERSIONS)}"
            )
        record = _recording.get()
        extra = () if record is None else record.outputs
        wanted = (*(_OUTPUTS[name] for name in ("log_probs", *outputs)), *extra)
        options = HeadOptions(
            temperature, final_logit_softcapping, logit_scale, wanted, self.budget, self.backend
        )
        stats = score(hidden, weight, bias, targets, options, GATHER.current())
        if record is not None:
            record.calls.append(HeadCall(hidden, weight, bias, targets, options, stats))
        named = {theirs: getattr(stats, ours) for theirs, ours in _OUTPUTS.items()}
        return tuple(
            value if name == "log_probs" or name in outputs else None
            for name, value in named.items()
        )


class Compact(Replacement):
    """Says on a CPU, too, that only the valid positions go to the head.

    TRL asks its kernel's device test; without Triton it scores every position with labels clamped.
    """

    def __call__(self, device: torch.device) -> bool:
        return device.type == "cpu" or self.original(device)

"""TRL's fused head, taken over at the one name all its stable trainers share.

`trl.trainer.utils.add_fused_lm_head` finds the valid positions, gathers what FSDP, ZeRO-3 or PEFT
hide, and hands [N, H] hidden states to `_ChunkedLogProbFunction.apply`, which it looks up in its
module at every call. DPO, KTO, SFT, GRPO and RLOO scripts and their metrics stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ops.shards.gathered import HeadOptions, score
from ...ops.tiles.known import is_quantised
from ...ops.walks.checks import DTYPES
from ...ops.walks.head import beside
from ..adapter import operands, rounded
from ..seams.during import during
from ..seams.saying import say_once
from ..seams.seam import Replacement, Seam
from . import sampled

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
GATHER = Seam(_MODULE, "maybe_gather_lm_head_ctx", ("params",), ("1.13", "1.14", *_VERSIONS))

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
    """What one call of the head was given, for quantities TRL does not know."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    adapter: tuple[Tensor, Tensor] | None  # [N, r], [V, r]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]
    options: HeadOptions

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight with the adapter's columns beside them, a copy where one is."""
        if hasattr(self.weight, "ds_id") or not self.weight.untyped_storage().size():
            raise RuntimeError(
                "lm_head.weight: expected a whole tensor after the forward, where the objective "
                "reads it again, got a shard"
            )
        if self.adapter is None:
            return self.hidden, self.weight
        down, up = (part.to(self.hidden.dtype) for part in self.adapter)
        return beside(self.hidden, down), beside(self.weight, up)


_recording: ContextVar[list[HeadCall] | None] = ContextVar("fastpo_recording", default=None)


@contextmanager
def recording() -> Iterator[list[HeadCall]]:
    """The calls of fused heads in the block, in order."""
    calls: list[HeadCall] = []
    with during(_recording, calls):
        yield calls


_adapter: ContextVar[list[Any] | None] = ContextVar("fastpo_adapter", default=None)


@contextmanager
def adapted(layer: Any) -> Iterator[None]:
    """The head of the next call is this layer, of PEFT or quantised: TRL hands over a weight."""
    waiting = [layer]
    with during(_adapter, waiting):
        yield
        if waiting:
            raise RuntimeError(
                "fastpo.patch: expected in force while training in float32, bfloat16 or float16, "
                "because TRL's own head ignores the adapter on lm_head, or that it is quantised; "
                "got TRL's own head"
            )


_light: ContextVar[bool] = ContextVar("fastpo_light", default=False)


@contextmanager
def light_passes() -> Iterator[None]:
    """Calls without gradient in the block compute log-probabilities only."""
    with during(_light, True):
        yield


def unserved(**tensors: Tensor | None) -> str | None:
    """Which of a head's tensors fastpo has no kernels for; None when there is none."""
    for name, tensor in tensors.items():
        if tensor is not None and is_quantised(tensor):
            return f"{name}: expected a tensor or quantised words, got {type(tensor).__name__}"
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name}: expected dtype float32, bfloat16 or float16, got {tensor.dtype}"
    return None


class WithOptions(Replacement):
    """own: what a call of TRL's does not say, budget and backend."""

    def __init__(self, original: Any, own: HeadOptions) -> None:
        super().__init__(original)
        self.own = own


class FusedHead(WithOptions):
    """`linear_logps` behind the `apply` of TRL's autograd function."""

    @torch.compiler.disable  # else a graph breaks at each thing that it asks of its thread
    def apply(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *_ = arguments
        if _adapter.get():  # which was looked at
            weight = None
        why = unserved(hidden=hidden, weight=weight, bias=bias)
        if why is None:
            return self.scored(*arguments)
        say_once("TRL keeps its own head", why)
        results: tuple[Tensor | None, ...] = self.original.apply(*arguments)
        return results

    def scored(
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
        if _light.get() and not torch.is_grad_enabled():
            outputs = ()
        wanted = tuple(_OUTPUTS[name] for name in ("log_probs", *outputs))
        options = replace(
            self.own,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=wanted,
        )
        layer, adapter = _adapter.get(), None
        if layer:
            weight, adapter = operands(layer.pop(), hidden)
            hidden = rounded(hidden, weight)
        gather, call = GATHER.current(), (hidden, weight, bias, targets, options)
        stats = sampled.scored(call, gather, adapter)
        if stats is None:
            stats = score(*call, gather, adapter)
        calls = _recording.get()
        if calls is not None:
            calls.append(HeadCall(hidden, weight, adapter, bias, targets, options))
        return tuple(getattr(stats, name) for name in _OUTPUTS.values())


class Compact(Replacement):
    """Says on a CPU, too, that only the valid positions go to the head.

    TRL asks its kernel's device test; without Triton it scores every position with labels clamped.
    """

    def __call__(self, device: torch.device) -> bool:
        return device.type == "cpu" or self.original(device)

"""verl's own fused heads, and what it reads of logits, on fastpo's head.

verl has two: Triton kernels with log-probability and entropy, over tensor-parallel heads as well,
and chunks of PyTorch. Both build logits, of a tile or a chunk, in each pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.shards.gathered import HeadOptions
from ..ops.stats import TokenStats
from ..ops.vocab_parallel_logps import score_sharded, vocab_parallel_logps
from ..ops.walks.checks import DTYPES
from .lazy.logits import promise_of
from .seams.saying import say_once
from .seams.seam import (
    Make,
    Replacement,
    Seam,
    replace_when_imported,
    replace_where_they_fit,
    restore,
)

_OUTPUTS = ("logps", "entropy")
_OTHERWISE = "verl keeps its own head"


class _Head(Replacement):
    def __init__(self, original: Any, options: HeadOptions) -> None:
        super().__init__(original)
        self.options = options

    def score(self, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Any:
        """[N] of hidden [N, H] and a whole head [V, H]."""
        options = replace(self.options, temperature=temperature, outputs=_OUTPUTS)
        return score_sharded(hidden, weight, None, labels, options)


class _Kernels(_Head):
    """`linear_cross_entropy`: float32 log-probabilities and entropies [N]."""

    def __call__(
        self,
        hidden: Tensor,  # [..., H]
        weight: Tensor,  # [V, H], or the words of this process
        labels: Tensor,  # [...] of the whole vocabulary
        temperature: Any = 1.0,
        reduction: Any = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        served = isinstance(temperature, int | float) and reduction == "none"
        if not served or hidden.dtype not in DTYPES:
            say_once(_OTHERWISE, f"reduction={reduction}, dtype={hidden.dtype}")
            own: tuple[Tensor, Tensor] = self.original(
                hidden, weight, labels, temperature, reduction, dist_process_group
            )
            return own
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        if dist_process_group is None:
            stats = self.score(hidden, weight, labels, temperature)
        else:
            stats = self.parallel(hidden, weight, labels, temperature, dist_process_group)
        assert stats.logps is not None and stats.entropy is not None
        return stats.logps, stats.entropy

    def parallel(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> TokenStats:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return vocab_parallel_logps(
            _Shared.apply(hidden, size),
            weight,
            labels,
            first=rank * len(weight),
            vocab=size * len(weight),
            group=group,
            temperature=temperature,
            ignore_index=None,
            outputs=_OUTPUTS,
            budget=self.options.budget,
            backend=self.options.backend,
        )


class _Shared(torch.autograd.Function):
    """verl sums d hidden over the group itself, where it spreads the sequence again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int) -> Tensor:
        ctx.size = size
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


class _Chunks(_Head):
    """`FusedLinearForPPOFunction`: entropies are in the dtype of the hidden states."""

    def apply(
        self,
        hidden_states: Tensor,  # [..., H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [...]
        temperature: Any = 1.0,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(temperature, int | float) or hidden_states.dtype not in DTYPES:
            say_once(_OTHERWISE, f"dtype={hidden_states.dtype}")
            own: tuple[Tensor, Tensor] = self.original.apply(
                hidden_states, vocab_weights, input_ids, temperature, chunk_size
            )
            return own
        hidden, shape = hidden_states.flatten(0, -2), input_ids.shape
        stats = self.score(hidden, vocab_weights, input_ids.flatten(), temperature)
        return stats.logps.view(shape), stats.entropy.view(shape).to(hidden.dtype)


class _Logps(Replacement):
    """`logprobs_from_logits`, which gives logits to extensions where there are some."""

    def __call__(self, logits: Any, labels: Tensor, inplace_backward: bool = True) -> Any:
        promise = promise_of(logits)
        if promise is None or labels.shape != promise.rows.shape:
            return self.original(logits, labels, inplace_backward)
        return promise.logps(labels)


_VERSIONS = ("0.9",)
_KERNEL = "verl.utils.kernel.linear_cross_entropy"
# The function is `apply` of this class, whose arguments it does not show.
_SIGNATURE = Seam(
    _KERNEL,
    "LinearCrossEntropy",
    ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
    _VERSIONS,
    "forward",
)
_FUNCTION = Seam(_KERNEL, "linear_cross_entropy", ("args", "kwargs"), _VERSIONS)
_CHUNKS = Seam(
    "verl.utils.experimental.torch_functional",
    "FusedLinearForPPOFunction",
    ("hidden_states", "vocab_weights", "input_ids", "temperature", "chunk_size"),
    _VERSIONS,
    "forward",
)
_LOGPS = Seam(
    "verl.utils.torch_functional",
    "logprobs_from_logits",
    ("logits", "labels", "inplace_backward"),
    _VERSIONS,
)
SEAMS = (_FUNCTION, _CHUNKS, _LOGPS)


def install(options: HeadOptions) -> None:
    """Now where verl is imported, else when it will be."""
    made: dict[Seam, Make] = {
        _FUNCTION: partial(_Kernels, options=options),
        _CHUNKS: partial(_Chunks, options=options),
        _LOGPS: _Logps,
    }
    put = partial(replace_where_they_fit, _OTHERWISE, beside=(_SIGNATURE,))
    replace_when_imported(made, put)


def remove() -> None:
    restore(*SEAMS)

"""`vocab_parallel_mixed_logps`: a mixture of heads whose words are spread alike over a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .mixed_linear_logps import MixtureOptions, mix, operands_of
from .shards.part import alike_in, beside, part_of
from .stats import TokenStats
from .tiles.tiled import TileSource
from .walks.mixture import Operands


def vocab_parallel_mixed_logps(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor | TileSource],
    coefficients: Sequence[float] | Tensor,
    labels: Tensor,
    *,
    first: int | None = None,
    vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    biases: Sequence[Tensor | None] | None = None,
    temperature: float = 1.0,
    softcaps: Sequence[float | None] | None = None,
    logit_scales: Sequence[float] | None = None,
    ignore_index: int | None = -100,
    outputs: tuple[str, ...] = ("logps",),
    backend: str | None = None,
) -> TokenStats:
    """`mixed_linear_logps` of heads of which all weights hold words [first, first + words).

    Every process of `group` calls with the same hidden states, labels, coefficients and options,
    and gets the same bits: one all-gather of 7 numbers a token. In the backward each expects the
    gradient of the same loss; d hidden of each head is summed over the group in float32, d weight
    and d bias are those of its own words.

    hiddens: M of [..., H_i], float32, bfloat16 or float16.
    weights, biases: M of [words, H_i] and [words], or of DTensors [V, H_i] and [V].
    coefficients: M numbers, or a tensor [M], or [..., M] for each token.
    labels: [...] int64, in [0, V) or ignore_index; labels[i] is scored by hidden[i], unshifted.
    softcaps, logit_scales: M, one for each head.
    first, vocab, group: as in `vocab_parallel_logps`; DTensors are of one mesh.

    Raises what `mixed_linear_logps` raises; what `vocab_parallel_logps` raises of shards and
    processes; RuntimeError without an initialised process group.
    """
    alike = alike_in(locals())
    head, *others = operands_of(hiddens, weights, biases)
    part = part_of(head.weight, head.bias, first, vocab, group, alike)
    parts = [Operands(head.hidden, part.weight, part.bias)]
    for i, other in enumerate(others, 1):
        words = beside(head.weight, other.weight, other.bias, f"head {i}: ")
        parts.append(Operands(other.hidden, *words))
    options = MixtureOptions(
        temperature,
        softcaps,
        logit_scales,
        ignore_index,
        outputs,
        backend,
        part.shard,
        "vocab_parallel_mixed_logps",
    )
    return _mix(parts, coefficients, labels, options)


# Not for a compiler, as the other heads in shards.
_mix = torch.compiler.disable(mix)

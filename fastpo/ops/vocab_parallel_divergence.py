"""`vocab_parallel_divergence`: two heads whose words are spread alike over a group's processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .linear_divergence import DivergenceOptions, DivergenceStats, diverge
from .shards.part import beside, part_of
from .tiles.tiled import TileSource, tiled
from .walks.checks import check_whole
from .walks.mixture import Operands


def vocab_parallel_divergence(
    hidden: Tensor,  # [..., H] float32 / bfloat16 / float16
    weight: Tensor | TileSource,  # [words, H], or a DTensor [V, H] in shards of words
    teacher_hidden: Tensor,  # [..., H']
    teacher_weight: Tensor | TileSource,  # [words, H'], or a DTensor [V, H'] of the same mesh
    *,
    kind: str,
    first: int | None = None,
    vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    beta: float = 0.5,
    alpha: float = 0.5,
    mask: Tensor | None = None,  # [...] bool
    bias: Tensor | None = None,  # [words], or a DTensor [V]
    teacher_bias: Tensor | None = None,  # as `bias`
    temperature: float | Tensor = 1.0,  # a number, or one per token: [...]
    teacher_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    teacher_grad: bool = False,
    outputs: tuple[str, ...] = ("divergence",),
    budget: int | None = None,
    backend: str | None = None,
) -> DivergenceStats:
    """`linear_divergence` of heads of which both weights hold words [first, first + words).

    Every process of `group` calls with the same hidden states, mask and options, and gets the same
    bits: one all-gather of 6 numbers a token, for all kinds but the KLs a sum of 3 more. In the
    backward each expects the gradient of the same loss; d hidden of both is summed over the group
    in float32, d weight and d bias are those of its own words. The budget is that of one process.

    first, vocab: the first word here and V; left out for DTensors, which tell, and whose gradients
        are some again.
    group: None: all processes; of DTensors, their mesh.

    Raises what `linear_divergence` raises; ValueError where shards do not make up [0, V) on a CPU,
    elsewhere all is NaN then; RuntimeError without an initialised process group.
    """
    weight, teacher_weight = tiled(weight), tiled(teacher_weight)
    part = part_of(weight, bias, first, vocab, group)
    check_whole(hidden=hidden, teacher_hidden=teacher_hidden)
    student = Operands(hidden, part.weight, part.bias)
    teacher = Operands(teacher_hidden, *beside(weight, teacher_weight, teacher_bias))
    options = DivergenceOptions(
        kind=kind,
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        logit_scale=logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        teacher_grad=teacher_grad,
        outputs=outputs,
        budget=budget,
        backend=backend,
        shard=part.shard,
        name="vocab_parallel_divergence",
    )
    return _diverge(student, teacher, mask, options)


# Not for a compiler: the operator of a graph knows no group.
_diverge = torch.compiler.disable(diverge)

"""`vocab_parallel_divergence`: two heads whose words are spread alike over a group's processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .linear_divergence import DivergenceOptions, DivergenceStats, diverge
from .shards.gathered import whole
from .shards.part import alike_in, beside, in_shards, of_dtensor, part_of
from .shards.tokens import Tokens, count
from .tiles.tiled import Tiled, TileSource, tiled
from .walks.checks import check_flag, check_whole
from .walks.mixture import Operands
from .walks.vocab_shard import VocabShard


def vocab_parallel_divergence(
    hidden: Tensor,
    weight: Tensor | TileSource,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | TileSource,
    *,
    kind: str,
    first: int | None = None,
    vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    own_tokens: bool = False,
    beta: float = 0.5,
    alpha: float = 0.5,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
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

    hidden, teacher_hidden: [..., H] and [..., H'], float32, bfloat16 or float16.
    weight, teacher_weight: [words, H] and [words, H'], or DTensors [V, H] and [V, H'] of one mesh,
        in shards of words; bias, teacher_bias: [words], or DTensors [V].
    mask: [...] bool.
    temperature: a number, or one per token, [...].
    first, vocab: the first word here and V; left out for DTensors, which tell, and whose gradients
        are some again.
    group: None: all processes; of DTensors, their mesh.
    own_tokens: hidden states and mask differ, in number, too. They are gathered, so every process
        holds all tokens' [N, H] and [N, H']; results are those of its own tokens. Each expects the
        gradient of its own loss, and d weight is the mean over the processes, as data parallelism
        has it. Counts are exchanged first, which waits for the device.

    Raises what `linear_divergence` raises; what `vocab_parallel_logps` raises of shards and
    processes; RuntimeError without an initialised process group.
    """
    alike = alike_in(locals())
    weight, teacher_weight = tiled(weight), tiled(teacher_weight)
    check_flag("own_tokens", own_tokens)
    part = part_of(weight, bias, first, vocab, group, alike)
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
    return _diverge(student, teacher, mask, options, own_tokens)


# Not for a compiler: the operator of a graph knows no group.
@torch.compiler.disable
def _diverge(
    student: Operands,
    teacher: Operands,
    mask: Tensor | None,
    options: DivergenceOptions,
    own_tokens: bool,
) -> DivergenceStats:
    if not own_tokens:
        return diverge(student, teacher, mask, options)
    assert options.shard is not None
    counted = partial(count, name=options.name, group=options.shard.group)
    return diverge(student, teacher, mask, options, counted)


def diverge_sharded(
    student: Operands,  # [..., H], [V, H] and [V]; weight and bias may be DTensors
    teacher: Operands,
    mask: Tensor | None,  # [...]
    options: DivergenceOptions,
    *,
    own_tokens: bool = True,
) -> DivergenceStats:
    """`linear_divergence` of heads that may be in shards, of FSDP2 or, not `own_tokens`,
    tensor-parallel. Of a frozen teacher that all have whole each reads the student's words."""
    parts = _parts(student, teacher, options)
    if parts is not None:
        own, other, shard = parts
        shared = replace(options, shard=shard)
        if not own_tokens:
            return diverge(own, other, mask, shared)
        n = student.hidden.shape[:-1].numel()
        taught = teacher.hidden if options.teacher_grad else teacher.hidden.detach()
        tokens = count(n, (student.hidden, taught), name=options.name, group=shard.group)
        if _fewer(tokens, student, teacher):
            return diverge(own, other, mask, shared, lambda *_: tokens)
    student, teacher = (
        Operands(x.hidden, whole(x.weight), None if x.bias is None else whole(x.bias))
        for x in (student, teacher)
    )
    return diverge(student, teacher, mask, options)


def _parts(
    student: Operands, teacher: Operands, options: DivergenceOptions
) -> tuple[Operands, Operands, VocabShard] | None:
    """The same words of both heads; None where they have to be whole."""
    own, other = student.weight, teacher.weight
    if not in_shards(own) or len(own) != len(other):
        return None
    part = of_dtensor(own, student.bias)
    if in_shards(other) and other.device_mesh == own.device_mesh:
        theirs = of_dtensor(other, teacher.bias)
        weight, bias = theirs.weight, theirs.bias
    elif options.teacher_grad or isinstance(other, DTensor | Tiled):
        return None
    else:
        words = slice(part.shard.first, part.shard.first + len(part.weight))
        weight, bias = other[words], None if teacher.bias is None else teacher.bias[words]
    sides = (
        Operands(student.hidden, part.weight, part.bias),
        Operands(teacher.hidden, weight, bias),
    )
    return *sides, part.shard


def _fewer(tokens: Tokens, student: Operands, teacher: Operands) -> bool:
    """Do the tokens of all processes weigh less on the wire than the heads?

    Hidden states are gathered in 16 bits, the student's gradients summed in 32; the student's head
    is gathered and its gradient scattered in 16 bits, the teacher's gathered, where it has to be.
    """
    (words, width), other = student.weight.shape, teacher.weight.shape[1]
    sharded = isinstance(teacher.weight, DTensor)
    travels = (5 * width + other) * sum(tokens.counts)
    return travels <= (2 * width + other * sharded) * words

"""How far a promised distribution is from another, row by row, without the logits of either."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from ...ops.linear_divergence import DivergenceOptions
from ...ops.vocab_parallel_divergence import diverge_sharded
from ...ops.walks.head import beside
from ...ops.walks.mixture import Operands
from .promise import Promise


def divergence(student: Promise, teacher: Promise, kind: str, beta: float = 0.5) -> Tensor:
    """A kind of `linear_divergence` per position [*rows.shape], nats, of heads that join."""
    scored = ((student.rows >= 0) & (teacher.rows >= 0)).flatten()
    rows = [side.rows.flatten().clamp(min=0) for side in (student, teacher)]
    found: Tensor | None = None
    if isinstance(student.base.weight, DTensor):  # hidden states that do not count do not travel
        found = scored.nonzero().squeeze(1)
        rows = [x.index_select(0, found) for x in rows]
    options = DivergenceOptions(
        kind,
        beta,
        softcap=student.options.softcap,
        teacher_softcap=teacher.options.softcap,
        logit_scale=student.options.logit_scale,
        teacher_logit_scale=teacher.options.logit_scale,
        teacher_grad=teacher.requires_grad,
        budget=student.options.budget,
        backend=student.options.backend,
    )
    own, other = (_operands(x, row) for x, row in zip((student, teacher), rows, strict=True))
    mask, own_tokens = scored if found is None else None, student.base.own_tokens
    values = diverge_sharded(own, other, mask, options, own_tokens=own_tokens).divergence
    assert values is not None
    if found is not None:
        values = values.new_zeros(len(scored)).index_copy(0, found, values)
    return values.view(student.rows.shape)


def _operands(side: Promise, rows: Tensor) -> Operands:
    hidden, adapter = side.base.select(rows)
    weight, bias = side.base.weight, side.base.bias
    if adapter is None:
        return Operands(hidden, weight, bias)
    down, up = (part.to(hidden.dtype) for part in adapter)
    hidden, weight = beside(hidden, down), beside(weight.to(hidden.dtype), up)
    return Operands(hidden, weight, bias)

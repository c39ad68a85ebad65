"""How far a promised distribution is from another, row by row, without the logits of either."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.linear_divergence import linear_divergence
from .promise import Promise


def divergence(student: Promise, teacher: Promise, kind: str, beta: float = 0.5) -> Tensor:
    """A kind of `linear_divergence` per position [*rows.shape], nats, of heads that join."""
    rows = [side.rows.flatten().clamp(min=0) for side in (student, teacher)]
    scored = (student.rows >= 0) & (teacher.rows >= 0)
    sides = [_operands(side, row) for side, row in zip((student, teacher), rows, strict=True)]
    found = linear_divergence(
        *sides[0],
        *sides[1],
        kind=kind,
        beta=beta,
        mask=scored.flatten(),
        bias=student.base.bias,
        teacher_bias=teacher.base.bias,
        softcap=student.options.softcap,
        teacher_softcap=teacher.options.softcap,
        logit_scale=student.options.logit_scale,
        teacher_logit_scale=teacher.options.logit_scale,
        teacher_grad=teacher.requires_grad,
        budget=student.options.budget,
        backend=student.options.backend,
    )
    assert found.divergence is not None
    return found.divergence.view(student.rows.shape)


def _operands(side: Promise, rows: Tensor) -> tuple[Tensor, Tensor]:
    hidden, adapter = side.base.select(rows)
    if adapter is None:
        return hidden, side.base.weight
    down, up = (part.to(hidden.dtype) for part in adapter)
    return torch.cat((hidden, down), 1), torch.cat((side.base.weight.to(hidden.dtype), up), 1)

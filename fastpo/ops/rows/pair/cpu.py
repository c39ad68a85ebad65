"""Row kernels of `linear_divergence` in csrc/cpu; rows/cpu.py chooses the instruction set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import cpu as rows_cpu
from ..native import (
    DTYPES,
    address,
    check_bias,
    check_fields,
    check_inverse,
    check_matrix,
    compiled,
    inner,
)
from . import backend as P

if TYPE_CHECKING:
    from ...._C import PairRule, PairSide, PairTile

_C, _MISSING = compiled()


def softmaxes(sides: P.Sides, first: int, state: Tensor, over: int | None, entropy: bool) -> None:
    assert _C is not None, _MISSING
    check_fields(state, P.STATE, len(sides[0].tile))
    work = _C.PairSoftmaxes(
        tile=_pair(sides, first),
        state=state.data_ptr(),
        state_stride=state.stride(0),
        over=-1 if over is None else over,
        entropy=entropy,
    )
    _C.pair_softmaxes_cpu(work, torch.get_num_threads(), rows_cpu.ISA)


def values(sides: P.Sides, first: int, constants: Tensor, rule: P.Rule, sums: Tensor) -> None:
    assert _C is not None, _MISSING
    n = len(sides[0].tile)
    check_fields(constants, P.CONSTANTS, n)
    check_fields(sums, P.SUMS, n, torch.float64)
    work = _C.PairValues(
        tile=_pair(sides, first),
        rule=_rule(rule),
        constants=constants.data_ptr(),
        constants_stride=constants.stride(0),
        sums=sums.data_ptr(),
        sums_stride=sums.stride(0),
    )
    _C.pair_values_cpu(work, torch.get_num_threads(), rows_cpu.ISA)


def gradients(
    sides: P.Sides,
    first: int,
    constants: Tensor,
    factors: Tensor,
    rule: P.Rule,
    outs: tuple[Tensor | None, Tensor | None],
) -> None:
    assert _C is not None, _MISSING
    n = len(sides[0].tile)
    check_fields(constants, P.CONSTANTS, n)
    check_fields(factors, P.FACTORS, n)
    work = _C.PairGradients(
        tile=_pair(sides, first, outs),
        rule=_rule(rule),
        constants=constants.data_ptr(),
        constants_stride=constants.stride(0),
        factors=factors.data_ptr(),
        factors_stride=factors.stride(0),
    )
    _C.pair_gradients_cpu(work, torch.get_num_threads(), rows_cpu.ISA)


def _rule(rule: P.Rule) -> PairRule:
    assert _C is not None, _MISSING
    return _C.PairRule(kind=P.KINDS.index(rule.kind), parameter=rule.parameter)


def _pair(
    sides: P.Sides, first: int, outs: tuple[Tensor | None, Tensor | None] = (None, None)
) -> PairTile:
    assert _C is not None, _MISSING
    n, v = sides[0].tile.shape
    student, teacher = (
        _side(side, first, n, v, out) for side, out in zip(sides, outs, strict=True)
    )
    return _C.PairTile(student=student, teacher=teacher, n=n, v=v, first=first)


def _side(side: P.Side, first: int, n: int, v: int, out: Tensor | None) -> PairSide:
    assert _C is not None, _MISSING
    check_matrix(side.tile, n, v, torch.float32)
    check_bias(side.bias, first, v)
    check_inverse(side.logit_map, n)
    if out is not None:
        check_matrix(out, n, v)
    return _C.PairSide(
        tile=side.tile.data_ptr(),
        tile_stride=side.tile.stride(0),
        bias=address(side.bias),
        inner=inner(side.logit_map),
        cap=side.logit_map.cap,
        inverse=address(side.logit_map.inverse),
        factor=side.logit_map.factor,
        out=address(out),
        out_dtype=0 if out is None else DTYPES[out.dtype],
        out_stride=0 if out is None else out.stride(0),
    )

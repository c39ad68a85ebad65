"""Row kernels of `linear_divergence` in Triton; rows/triton.py says where they run.

Triton is imported by the first call, so that fastpo imports on a machine without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..triton import map_arguments
from . import backend as P

if TYPE_CHECKING:
    from ....kernels.pair_operands import PairSide, PairTerms


def softmaxes(sides: P.Sides, first: int, state: Tensor, over: int | None, entropy: bool) -> None:
    from ....kernels.pair_rows import pair_softmaxes

    pair_softmaxes(_both(sides), first, state, over=over, entropy=entropy)


def values(sides: P.Sides, first: int, constants: Tensor, rule: P.Rule, sums: Tensor) -> None:
    from ....kernels.pair_rows import pair_values

    pair_values(_both(sides), first, constants, sums, _terms(rule))


def gradients(
    sides: P.Sides,
    first: int,
    constants: Tensor,
    factors: Tensor,
    rule: P.Rule,
    outs: tuple[Tensor | None, Tensor | None],
) -> None:
    from ....kernels.pair_rows import pair_gradients

    pair_gradients(_both(sides), first, constants, factors, outs, _terms(rule))


def _both(sides: P.Sides) -> tuple[PairSide, PairSide]:
    from ....kernels.pair_operands import PairSide

    student, teacher = (
        PairSide(x.tile, x.bias, factor=x.logit_map.factor, **map_arguments(x.logit_map))
        for x in sides
    )
    return student, teacher


def _terms(rule: P.Rule) -> PairTerms:
    """The parameter's own differences and products, which float32 would round."""
    from ....kernels.pair_operands import PairTerms

    x = rule.parameter
    scale = 1 / (x * (x - 1)) if rule.kind == "alpha" else 1.0
    return PairTerms(P.KINDS.index(rule.kind), 1 - x, x, scale)

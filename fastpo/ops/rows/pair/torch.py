"""Row kernels of `linear_divergence` in plain PyTorch: any device, and the others' definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch import logits
from . import backend as P

_LEAST = torch.finfo(torch.float32).min  # stands in for a maximum of -inf


def softmaxes(sides: P.Sides, first: int, state: Tensor, over: int | None, entropy: bool) -> None:
    gaps, shifts, exps, masses = [], [], [], []
    for i, side in enumerate(sides):
        z = logits(side.tile, first, side.bias, side.logit_map)
        before = state[P.MAX + 2 * i].clone()
        m = torch.maximum(before, z.amax(1))
        reference = m.clamp_min(_LEAST)
        gaps.append((z - reference.unsqueeze(1)).clamp_min_(P.LOWEST))
        shifts.append((before - reference).clamp_min_(P.LOWEST))
        exps.append(gaps[i].exp())
        masses.append(state[P.MASS + 2 * i].clone())
        state[P.MAX + 2 * i] = m
        state[P.MASS + 2 * i] = masses[i] * shifts[i].exp() + exps[i].sum(1)
    if over is not None:
        a, b = over, 1 - over
        moved = state[P.CROSS] + (shifts[a] - shifts[b]) * masses[a]
        state[P.CROSS] = shifts[a].exp() * moved + (exps[a] * (gaps[a] - gaps[b])).sum(1)
    if entropy:
        moved = state[P.MOMENT] + shifts[0] * masses[0]
        state[P.MOMENT] = shifts[0].exp() * moved + (exps[0] * gaps[0]).sum(1)


def _logps(sides: P.Sides, first: int, constants: Tensor) -> list[Tensor]:
    found = []
    for i, side in enumerate(sides):
        shift, log_mass = constants[P.SHIFT + 2 * i], constants[P.LOG_MASS + 2 * i]
        z = logits(side.tile, first, side.bias, side.logit_map)
        log_p = (z - shift.unsqueeze(1)).sub_(log_mass.unsqueeze(1))
        found.append(log_p.clamp_min_(P.LOWEST))
    return found


def values(sides: P.Sides, first: int, constants: Tensor, rule: P.Rule, sums: Tensor) -> None:
    for row, terms in enumerate(rule.terms(*_logps(sides, first, constants))):
        sums[row] += terms.sum(1)


def gradients(
    sides: P.Sides,
    first: int,
    constants: Tensor,
    factors: Tensor,
    rule: P.Rule,
    outs: tuple[Tensor | None, Tensor | None],
) -> None:
    logps = _logps(sides, first, constants)
    _, *derivatives = rule.terms(*logps)
    grad = factors[P.GRAD].unsqueeze(1)
    for i, (side, out) in enumerate(zip(sides, outs, strict=True)):
        if out is None:
            continue
        total = factors[P.TOTAL + i].unsqueeze(1)
        dz = derivatives[i].sub_(logps[i].exp().mul_(total))
        dz.mul_(grad * side.logit_map.tempered(side.logit_map.factor, dz))
        if side.logit_map.softcap is not None:
            z = logits(side.tile, first, side.bias, side.logit_map)
            dz.mul_(side.logit_map.cap_slope(z))
        # Selected, because 0·NaN is NaN.
        out.copy_(dz.masked_fill_(grad == 0, 0.0))

"""Row kernels in plain PyTorch: any device, and the definition the others are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as R


def unavailable(device: torch.device) -> str | None:
    return None


def logits(tile: Tensor, first: int, bias: Tensor | None, logit_map: R.LogitMap) -> Tensor:
    x = tile if bias is None else tile + bias[first : first + tile.shape[1]]
    if logit_map.softcap is None:
        return x * logit_map.tempered(logit_map.factor, x)
    saturation = torch.tanh(x * (logit_map.logit_scale / logit_map.softcap))
    return saturation * logit_map.tempered(logit_map.cap, x)


def _columns(tile: Tensor, first: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Column of the label [n, 1] and of every cell [v]; a label elsewhere matches no cell."""
    column = torch.arange(tile.shape[1], dtype=torch.int64, device=tile.device)
    return (labels - first).unsqueeze(1), column


def forward(
    tile: Tensor,
    first: int,
    labels: Tensor,
    bias: Tensor | None,
    state: Tensor,
    logit_map: R.LogitMap,
    stats: int,
    kept: Tensor | None,
    anchors: Tensor | None,
    fold_cap: bool,
) -> None:
    z = logits(tile, first, bias, logit_map)  # [n, v]
    label, column = _columns(tile, first, labels)
    is_label = column == label
    before = state[R.MAX].clone()
    m = torch.maximum(before, z.amax(1))
    # Finite where a whole tile is masked out by a bias of -inf: -inf - -inf would be NaN.
    reference = m.clamp_min(torch.finfo(torch.float32).min)
    others = (z - reference.unsqueeze(1)).exp_().masked_fill_(is_label, 0.0)
    shrink = torch.exp(before - reference)
    if stats & R.STATS["entropy"]:
        gap = (z - reference.unsqueeze(1)).clamp_min_(R.LOG_FLOOR)
        shift = (before - reference).clamp_min(R.LOG_FLOOR) * state[R.OTHERS]
        state[R.MOMENT] = shrink * (state[R.MOMENT] + shift) + (others * gap).sum(1)
    if stats & R.STATS["log_sum_sq_probs"]:
        state[R.SQUARES] = shrink.square() * state[R.SQUARES] + others.square().sum(1)
    if stats & R.STATS["mean_logits"]:
        state[R.SUM] += z.sum(1)
    if stats & R.STATS["is_top1"]:
        earlier = z.masked_fill(column >= label, float("-inf")).amax(1)
        state[R.BEFORE] = torch.maximum(state[R.BEFORE], earlier)
    found = z.gather(1, label.clamp(0, z.shape[1] - 1)).squeeze(1)
    state[R.TARGET] = torch.where(is_label.any(1), found, state[R.TARGET])
    state[R.OTHERS] = shrink * state[R.OTHERS] + others.sum(1)
    state[R.MAX] = m
    if kept is not None and anchors is not None:
        torch.sub(reference, R.headroom(kept.dtype), out=anchors)
        e = (z - anchors.unsqueeze(1)).exp_().masked_fill_(is_label, 0.0)
        kept.copy_(e * logit_map.cap_slope(z) if fold_cap else e)


def backward(
    source: Tensor,
    anchors: Tensor | None,
    first: int,
    labels: Tensor,
    bias: Tensor | None,
    grads: Tensor,
    logit_map: R.LogitMap,
    entropy_grad: bool,
    out: Tensor,
) -> None:
    label, column = _columns(source, first, labels)
    shift, log_mass = grads[R.SHIFT].unsqueeze(1), grads[R.LOG_MASS].unsqueeze(1)
    if anchors is None:
        z = logits(source, first, bias, logit_map)
        log_p = (z - shift - log_mass).clamp_min_(R.LOG_FLOOR)
        p = log_p.exp()
    else:
        e, anchor = source.float(), anchors.unsqueeze(1)
        z = e.log() + anchor
        log_p = (z - shift - log_mass).clamp_min_(R.LOG_FLOOR)
        p = e * (anchor - shift - log_mass).exp()
    dz = p * grads[R.COMMON].unsqueeze(1)
    if entropy_grad:
        dz = dz - p * log_p * grads[R.ENTROPY].unsqueeze(1)
    if logit_map.softcap is not None:
        # A cell whose exponential underflowed has z = -inf here and p = 0.
        saturation = (z / logit_map.tempered(logit_map.cap, z)).clamp_min(-1.0)
        dz = dz * (1.0 - saturation.square())
    dx = dz * logit_map.tempered(logit_map.factor, dz)
    out.copy_(torch.where(column == label, grads[R.LABEL].unsqueeze(1), dx))


def rescale(total: Tensor, before: Tensor, anchors: Tensor) -> None:
    total.mul_(torch.exp(before - anchors).unsqueeze(1))


def logps_of(state: Tensor) -> Tensor:
    """-log(1 + mass of the others / mass of the label): no cancellation however peaked.

    Functions round the end of a vector in their own way: in float64 that is far below float32, in
    which a token would have other bits at another place.
    """
    return _logps(state.double()).float()


def log_mass_of(state: Tensor) -> Tensor:
    """log Σ exp(z - m) over all words."""
    return _masses(state.double())[1].float()


def _logps(state: Tensor) -> Tensor:
    gap = state[R.MAX] - state[R.TARGET] + state[R.OTHERS].log()
    return -torch.logaddexp(gap, torch.zeros_like(gap))


def _masses(state: Tensor) -> tuple[Tensor, Tensor]:
    """Of the label, beside the others' in units of exp(m); log Σ exp(z - m) over all words."""
    m, others, target = state[R.MAX], state[R.OTHERS], state[R.TARGET]
    own = torch.exp(target - m)
    return own, torch.where(target == m, others.log1p(), (others + own).log())


def finish(state: Tensor, stats: tuple[str, ...], ignored: Tensor | None) -> dict[str, Tensor]:
    state = state.double()
    m, target = state[R.MAX], state[R.TARGET]
    own, log_mass = _masses(state)
    values = {"logps": _logps(state), "lse": m + log_mass, "target": target}
    values |= {"maximum": m, "log_mass": log_mass}
    if "entropy" in stats:
        moment = state[R.MOMENT] + own * (target - m).clamp_min(R.LOG_FLOOR)
        mass = state[R.OTHERS] + own
        values["entropy"] = (log_mass - moment / mass).clamp_min(0)
    if "log_sum_sq_probs" in stats:
        squares = state[R.SQUARES] + own.square()
        values["log_sum_sq_probs"] = squares.log() - 2 * log_mass
    values = {name: value.float() for name, value in values.items()}
    if "is_top1" in stats:
        values["is_top1"] = (target >= m) & (target > state[R.BEFORE])
    if ignored is None:
        return values
    return {name: value.masked_fill(ignored, 0) for name, value in values.items()}


def row_grads(
    saved: R.Saved, upstream: R.Upstream, logit_map: R.LogitMap, ignored: Tensor | None
) -> Tensor:
    logps, shift, log_mass, target, entropy = saved
    zero = torch.zeros_like(logps)
    g, g_entropy, g_lse = (zero if x is None else x for x in upstream)
    entropy = zero if entropy is None else entropy
    # d loss / d z_v = p_v·(common - g_entropy·log p_v), and at the label + g
    common = g_lse - g - g_entropy * entropy
    log_p = logps.clamp_min(R.LOG_FLOOR)  # 0·(-inf) for a label whose bias is -inf would be NaN
    at_label = -g * torch.expm1(logps) + logps.exp() * (g_lse - g_entropy * (log_p + entropy))
    at_label = at_label * logit_map.cap_slope(target)
    at_label = at_label * logit_map.tempered(logit_map.factor, at_label)
    rows = torch.stack((shift, log_mass, common, g_entropy, at_label))
    if ignored is not None:
        # exp(z - inf) = 0 and zero coefficients: nothing of the row is left.
        rows.masked_fill_(ignored, 0)
        rows[R.LOG_MASS].masked_fill_(ignored, float("inf"))
    return rows

"""The functions of torch that `LazyLogits` answers without logits, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.linear_topk import linear_topk
from ...ops.walks.picked import picked_products
from .logits import LazyLogits


def _last(logits: LazyLogits, dim: Any) -> bool:
    return isinstance(dim, int) and dim % logits.ndim == logits.ndim - 1


def cross_entropy(
    logits: LazyLogits,  # [N, V]
    target: Tensor,  # [N]
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    usual = weight is None and size_average is None and reduce is None and logits.ndim == 2
    if not usual or target.dtype != torch.int64 or logits.normalized:
        options = (weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        return F.cross_entropy(logits.real("cross_entropy"), target, *options)
    scored = target != ignore_index
    kept = logits.only(scored)
    losses = -kept.logps(target.masked_fill(~scored, 0))
    if label_smoothing:
        total = _sum_of_logs(kept)
        smooth = -total.masked_fill(~scored, 0) / logits.shape[-1]
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / scored.sum()


def _sum_of_logs(logits: LazyLogits) -> Tensor:
    """Σ_v log p_v of every row, with gradient."""
    return logits.shape[-1] * (logits.means() - logits.lse())


def log_softmax(
    logits: LazyLogits, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if not _last(logits, dim) or logits.normalized:
        return F.log_softmax(logits.real("log_softmax"), dim, dtype=dtype)
    made = replace(logits, normalized=True)
    return made if dtype is None else made.to(dtype)


def gather(logits: LazyLogits, dim: int, index: Tensor, **kwargs: Any) -> Any:
    """One word per row of log-softmax, or a few of anything."""
    if not _last(logits, dim) or index.shape[:-1] != logits.rows.shape or kwargs:
        return torch.gather(logits.real("gather"), dim, index, **kwargs)
    if logits.normalized and index.shape[-1] == 1:
        return logits.sign * logits.logps(index.squeeze(-1)).unsqueeze(-1)
    z = _words(logits, index)
    if not logits.normalized:
        return z
    return logits.sign * (z - logsumexp(_plain(logits), -1, True))


def _plain(logits: LazyLogits) -> LazyLogits:
    return replace(logits, normalized=False, sign=1.0)


def _words(logits: LazyLogits, index: Tensor) -> Tensor:
    """The logits of a few words per row [*rows.shape, K]."""
    base, rows = logits.base, logits.rows.flatten().clamp(min=0)
    hidden, adapter = base.select(rows)
    ids = index.flatten(0, -2)
    x = picked_products(hidden, base.weight, ids)
    if adapter is not None:
        x = x + picked_products(*adapter, ids)
    if base.bias is not None:
        x = x + base.bias.float()[ids]
    x = x * logits.inner
    return (x.tanh() * logits.outer if logits.capped else x).view(index.shape)


def topk(
    logits: LazyLogits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    """The k largest, the lowest word first where they tie."""
    base = logits.base
    if not _last(logits, dim) or not largest or base.adapter or logits.inner * logits.outer <= 0:
        return torch.topk(logits.real("topk"), k, dim, largest, sorted)
    rows = logits.rows.flatten().clamp(min=0)
    with torch.no_grad():  # scale and soft-cap keep the order
        found = linear_topk(base.hidden.index_select(0, rows), base.weight, k, bias=base.bias)
    ids = found.ids.view(*logits.rows.shape, k)
    return torch.return_types.topk((gather(logits, -1, ids), ids))


def take_along_dim(logits: LazyLogits, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None:
        return torch.take_along_dim(logits.real("take_along_dim"), indices)
    return gather(logits, dim, indices)


def index_select(logits: LazyLogits, dim: int, index: Tensor) -> Any:
    if _last(logits, dim):
        return torch.index_select(logits.real("index_select"), dim, index)
    return logits._view(logits.rows.index_select(dim % logits.ndim, index))


def total(logits: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Σ_v log p_v, which label smoothing asks for; or of logits, which a loss of nothing scales."""
    whole = dim is None and not keepdim and not logits.normalized
    if not (whole or _last(logits, dim)):
        return logits.real("sum").sum(dim, keepdim=keepdim, dtype=dtype)
    plain = _plain(logits)
    rows = _sum_of_logs(plain) if logits.normalized else logits.shape[-1] * plain.means()
    found = rows.sum() if whole else logits.sign * (rows.unsqueeze(-1) if keepdim else rows)
    return found if dtype is None else found.to(dtype)


def logsumexp(logits: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    if not _last(logits, dim) or logits.normalized:
        return torch.logsumexp(logits.real("logsumexp"), dim, keepdim)
    lse = logits.lse()
    return lse.unsqueeze(-1) if keepdim else lse


def mean(logits: LazyLogits, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if logits.normalized or kwargs or keepdim or (dim is not None and not _last(logits, dim)):
        return torch.mean(logits.real("mean"), dim, keepdim, **kwargs)
    means = logits.means()
    return means if dim is not None else means.mean()


def argmax(logits: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    flipped = logits.sign < 0 or logits.inner * logits.outer <= 0
    if not _last(logits, dim) or keepdim or flipped:
        return torch.argmax(logits.real("argmax"), dim, keepdim)
    base, rows = logits.base, logits.rows.flatten().clamp(min=0)
    hidden, adapter = base.select(rows)
    weight = base.weight
    with torch.no_grad():  # scale and soft-cap keep the order
        if adapter is not None:
            down, up = (x.to(hidden.dtype) for x in adapter)
            hidden, weight = torch.cat((hidden, down), 1), torch.cat((weight, up), 1)
        ids = linear_topk(hidden, weight, 1, bias=base.bias).ids
    return ids.view(logits.rows.shape)


FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: cross_entropy,
    F.log_softmax: log_softmax,
    torch.log_softmax: lambda logits, dim, dtype=None: log_softmax(logits, dim, dtype=dtype),
    torch.gather: gather,
    torch.take_along_dim: take_along_dim,
    torch.index_select: index_select,
    torch.sum: total,
    torch.logsumexp: logsumexp,
    torch.mean: mean,
    torch.argmax: argmax,
    torch.topk: topk,
    torch.tanh: LazyLogits.tanh,
    torch.mul: LazyLogits.__mul__,
    torch.div: LazyLogits.__truediv__,
    torch.neg: LazyLogits.__neg__,
    torch.chunk: LazyLogits.chunk,
    torch.split: LazyLogits.split,
}
METHODS: dict[str, Any] = {
    "log_softmax": FUNCTIONS[torch.log_softmax],
    "gather": gather,
    "index_select": index_select,
    "sum": total,
    "logsumexp": logsumexp,
    "mean": mean,
    "argmax": argmax,
    "topk": topk,
}

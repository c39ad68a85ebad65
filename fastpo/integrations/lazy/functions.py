"""The functions of torch that a promise answers without logits, in float32.

Each takes the promise in place of its first argument and returns tensors, promises, or
NotImplemented where only the logits will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.walks.picked import picked_products
from .blocks import fits_one_block, reduced
from .calls import (
    SUM,
    As,
    counted,
    first_words,
    is_sum,
    leading_sizes,
    of_torch,
    remember,
    words_of_rows,
)
from .promise import Promise

Answer = Callable[..., Any]


def _last(logits: Promise, dim: Any) -> bool:
    return (
        isinstance(dim, int)
        and -logits.ndim <= dim < logits.ndim
        and (dim % logits.ndim == logits.ndim - 1)
    )


def _leading(logits: Promise, dim: Any) -> int | None:
    """The dimension of the rows that this is; None for the vocabulary's, or none at all."""
    if not isinstance(dim, int) or not -logits.ndim <= dim < logits.ndim or _last(logits, dim):
        return None
    return dim % logits.ndim


# Views, and copies


def getitem(logits: Promise, index: Any) -> Any:
    leading, count = first_words(index, logits.ndim, logits.words)
    if leading is not None:
        whole: Any = logits.view(logits.rows[leading])
        if count == logits.words:
            return whole
        return whole.cut(count) if isinstance(whole, Promise) else NotImplemented
    found = words_of_rows(logits.rows, index, logits.words)
    if found is None:
        return NotImplemented
    rows, words, shape = found
    some: Any = logits.view(rows)
    if words.ndim == 1:
        if not isinstance(some, Promise):
            return reduced(some, [], lambda x, _: x.index_select(-1, words)).view(shape)
        if words.shape == shape[rows.ndim :] and not fits_one_block(some, len(words)):
            return some.chosen(words)
        words = words.expand(*rows.shape, -1)
    if isinstance(some, Promise):
        return gather(some.gathered, -1, words).view(shape)
    return reduced(some, [words], lambda x, given: x.gather(-1, given[0])).view(shape)


def reshape(logits: Promise, *shape: Any) -> Any:
    leading = leading_sizes(logits.shape, shape)
    return NotImplemented if leading is None else logits.view(logits.rows.reshape(leading))


def view(logits: Promise, *shape: Any) -> Any:
    leading = leading_sizes(logits.shape, shape)
    return NotImplemented if leading is None else logits.view(logits.rows.view(leading))


def flatten(logits: Promise, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = _leading(logits, start_dim), _leading(logits, end_dim)
    if start is None or end is None:
        return NotImplemented
    return logits.view(logits.rows.flatten(start, end))


def _along_rows(name: str) -> Answer:
    """`chunk`, `split`: the rows' own."""

    def along(logits: Promise, *args: Any, **kwargs: Any) -> Any:
        dim = _leading(logits, kwargs.get("dim", args[1] if len(args) > 1 else 0))
        if dim is None:
            return NotImplemented
        what = args[:1] or [value for key, value in kwargs.items() if key != "dim"]
        return tuple(map(logits.view, getattr(logits.rows, name)(*what, dim=dim)))

    return along


def unbind(logits: Promise, dim: int = 0) -> Any:
    leading = _leading(logits, dim)
    if leading is None:
        return NotImplemented
    return tuple(map(logits.view, logits.rows.unbind(leading)))


def unsqueeze(logits: Promise, dim: int) -> Any:
    if not -logits.ndim - 1 <= dim <= logits.ndim or dim % (logits.ndim + 1) == logits.ndim:
        return NotImplemented
    return logits.view(logits.rows.unsqueeze(dim % (logits.ndim + 1)))


def squeeze(logits: Promise, dim: int) -> Any:
    leading = _leading(logits, dim)
    return NotImplemented if leading is None else logits.view(logits.rows.squeeze(leading))


def index_select(logits: Promise, dim: int, index: Tensor) -> Any:
    leading = _leading(logits, dim)
    if _last(logits, dim):  # counted from the start only
        return NotImplemented if bool((index < 0).any()) else getitem(logits, (..., index))
    if leading is None:
        return NotImplemented
    return logits.view(logits.rows.index_select(leading, index))


def contiguous(logits: Promise, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    rows, packed = logits.rows.contiguous(), logits.pitch == logits.words
    if rows is logits.rows and packed:
        return logits
    return logits.view(rows if packed else logits.rows.clone(memory_format=memory_format))


def clone(logits: Promise, *, memory_format: Any = torch.preserve_format) -> Any:
    if memory_format not in (torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    return logits.view(logits.rows.clone())


def detach(logits: Promise) -> Promise:
    return logits.detach()


def to(logits: Promise, *args: Any, **kwargs: Any) -> Any:
    """Another dtype is remembered, where the logits stay on their device."""
    if set(kwargs) - {"dtype", "device", "non_blocking"}:
        return NotImplemented
    dtype = logits.dtype
    for x in (*args, kwargs.get("dtype"), kwargs.get("device")):
        if isinstance(x, torch.dtype):
            dtype = x
        elif isinstance(x, Tensor) or not _is_here(logits, x):
            return NotImplemented
    return _cast(logits, dtype)


def _is_here(logits: Promise, device: Any) -> bool:
    """Is it no other device? A bool is `non_blocking`."""
    if device is None or isinstance(device, bool):
        return True
    return torch.empty(0, dtype=logits.dtype, device=device).device == logits.device


def _cast(logits: Promise, dtype: torch.dtype) -> Any:
    """float64 asks for more than log-probabilities in float32."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return NotImplemented
    return logits if dtype == logits.dtype else logits.copy(dtype=dtype)


# Scale and soft-cap


def divide(logits: Promise, divisor: Any, *, rounding_mode: str | None = None) -> Any:
    number = isinstance(divisor, int | float) and divisor != 0
    return logits.scaled(1 / divisor) if number and rounding_mode is None else NotImplemented


def negative(logits: Promise) -> Any:
    return logits.scaled(-1)


def tanh(logits: Promise) -> Any:
    if logits.capped or logits.normalized:
        return NotImplemented
    return logits.copy(capped=True)


# Numbers


def cross_entropy(
    logits: Promise,  # [N, V]
    target: Tensor,  # [N]
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    usual = weight is None and size_average is None and reduce is None and logits.ndim == 2
    fits = isinstance(target, Tensor) and target.dtype == torch.int64
    fits = fits and target.shape == logits.shape[:1]
    known = reduction in ("none", "sum", "mean") and 0 <= label_smoothing <= 1
    if not (usual and fits and known) or logits.normalized:
        return NotImplemented
    scored = target != ignore_index
    kept = logits.only(scored)
    losses = -kept.logps(target.masked_fill(~scored, 0))
    if label_smoothing:
        total = _sum_of_logs(kept)
        if total is NotImplemented:
            return NotImplemented
        smooth = -total.masked_fill(~scored, 0) / logits.shape[-1]
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / scored.sum()


def _sum_of_logs(logits: Promise) -> Any:
    """Σ_v log p_v of every row, with gradient."""
    means = logits.means()
    return means if means is NotImplemented else logits.shape[-1] * (means - logits.lse())


def log_softmax(logits: Promise, dim: Any, dtype: torch.dtype | None = None) -> Any:
    if not _last(logits, dim) or logits.normalized:
        return NotImplemented
    if dtype is None and torch.is_autocast_enabled(logits.device.type):  # which may have its own
        dtype = torch.ones(1, dtype=logits.dtype, device=logits.device).log_softmax(-1).dtype
    made = logits.copy(normalized=True)
    return made if dtype is None else _cast(made, dtype)


def gather(logits: Promise, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """One word per row of log-softmax, or a few of anything."""
    whole = index.dtype in (torch.int64, torch.int32) and index.shape[:-1] == logits.rows.shape
    if not _last(logits, dim) or not whole or sparse_grad:
        return NotImplemented
    index = index.long()
    return remember(_picked(logits, index), logits, index)


def _picked(logits: Promise, index: Tensor) -> Tensor:
    if logits.normalized and index.shape[-1] == 1:
        return logits.sign * logits.logps(index.squeeze(-1)).unsqueeze(-1)
    z = _words(logits, index)
    return logits.sign * (z - logits.plain.lse().unsqueeze(-1)) if logits.normalized else z


def _words(logits: Promise, index: Tensor) -> Tensor:
    """The logits of a few words per row [*rows.shape, K]."""
    foreign = index[(index < 0) | (index >= logits.words)]
    if len(foreign):
        got = int(foreign[0])
        raise ValueError(f"index: expected values in [0, {logits.words}), got {got}")
    base, rows = logits.base, logits.rows.flatten().clamp(min=0)
    hidden, adapter = base.select(rows)
    ids = index.reshape(len(rows), index.shape[-1])
    x = picked_products(hidden, base.weight, ids)
    if adapter is not None:
        x = x + picked_products(*adapter, ids)
    if base.bias is not None:
        x = x + base.bias.float()[ids]
    x = x * logits.inner
    return (x.tanh() * logits.outer if logits.capped else x).view(index.shape)


def topk(logits: Promise, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """As the logits have them, so that k words reach the last; their gradient is that of words."""
    if not _last(logits, dim) or fits_one_block(logits):  # whose copies are compared with all
        return NotImplemented
    with torch.no_grad():
        found = reduced(logits, [], lambda x, _: x.topk(k, -1, largest, sorted))
    values, ids = found
    if logits.requires_grad and torch.is_grad_enabled():
        values = As.apply(values, _picked(logits, ids))
    return torch.return_types.topk((remember(values, logits, ids), ids))


def take_along_dim(logits: Promise, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None or indices.dtype != torch.int64:
        return NotImplemented
    return gather(logits, dim, counted(indices, logits.words))


def total(logits: Promise, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Σ_v log p_v, which label smoothing asks for; or of logits, which a loss of nothing scales."""
    whole = dim is None and not keepdim and not logits.normalized
    if not (whole or _last(logits, dim)) or dtype == torch.float64:
        return NotImplemented
    rows = _sum_of_logs(logits.plain) if logits.normalized else logits.means()
    if rows is NotImplemented:
        return NotImplemented
    rows = rows if logits.normalized else logits.shape[-1] * rows
    found = rows.sum() if whole else logits.sign * (rows.unsqueeze(-1) if keepdim else rows)
    return found if dtype is None else found.to(dtype)


def logsumexp(logits: Promise, dim: Any, keepdim: bool = False) -> Any:
    if not _last(logits, dim) or logits.normalized:
        return NotImplemented
    lse = remember(logits.lse().unsqueeze(-1), logits, SUM)
    return lse if keepdim else lse.squeeze(-1)


def minus(logits: Promise, other: Any) -> Any:
    """Log-probabilities, where it is their log-sum-exp: rounded to 16 bits each by itself, the
    gradients of the two would cancel."""
    if not is_sum(other, logits):
        return NotImplemented
    return log_softmax(logits, -1, torch.promote_types(logits.dtype, other.dtype))


def mean(logits: Promise, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if logits.normalized or keepdim or dtype or (dim is not None and not _last(logits, dim)):
        return NotImplemented
    means = logits.means()
    return means.mean() if dim is None and means is not NotImplemented else means


def argmax(logits: Promise, dim: Any = None, keepdim: bool = False) -> Any:
    if not _last(logits, dim):
        return NotImplemented
    with torch.no_grad():
        found: Tensor = reduced(logits, [], lambda x, _: x.argmax(-1, keepdim))
    return found


def maximum(logits: Promise, dim: Any = None, keepdim: bool = False) -> Any:
    """As `gather` gives it, which a greedy word is compared with."""
    ids = argmax(logits, dim, keepdim=True)
    if ids is NotImplemented:
        return NotImplemented
    found = (gather(logits, -1, ids), ids)
    return torch.return_types.max(found if keepdim else tuple(x.squeeze(-1) for x in found))


_VIEWS: dict[str, Answer] = {
    "__getitem__": getitem,
    "__iter__": lambda logits: iter(unbind(logits)),
    "view": view,
    "reshape": reshape,
    "flatten": flatten,
    "chunk": _along_rows("chunk"),
    "split": _along_rows("split"),
    "unbind": unbind,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "index_select": index_select,
    "contiguous": contiguous,
    "detach": detach,
}
_NAMED: dict[str, Answer] = {
    **_VIEWS,
    "clone": clone,
    "to": to,
    "cpu": lambda logits: to(logits, "cpu"),
    "float": lambda logits: _cast(logits, torch.float32),
    "bfloat16": lambda logits: _cast(logits, torch.bfloat16),
    "half": lambda logits: _cast(logits, torch.float16),
    **dict.fromkeys(("mul", "multiply"), Promise.scaled),
    **dict.fromkeys(("div", "divide"), divide),
    "true_divide": lambda logits, divisor: divide(logits, divisor),
    **dict.fromkeys(("sub", "subtract", "__sub__"), minus),
    **dict.fromkeys(("neg", "negative"), negative),
    "tanh": tanh,
    "cross_entropy": cross_entropy,
    "log_softmax": log_softmax,
    "gather": gather,
    "take_along_dim": take_along_dim,
    "sum": total,
    "logsumexp": logsumexp,
    "mean": mean,
    "argmax": argmax,
    "max": maximum,
    "topk": topk,
}


FUNCTIONS = {func: answer for name, answer in _NAMED.items() for func in of_torch(name)}
# Of anything made of rows.
VIEWS = {func: answer for name, answer in _VIEWS.items() for func in of_torch(name)}
FUNCTIONS[F.log_softmax] = lambda logits, dim=None, _stacklevel=3, dtype=None: log_softmax(
    logits, dim, dtype
)

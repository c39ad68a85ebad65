"""Logits that are asked for log-probabilities before they exist.

A trainer that takes `model(...).logits` and then log-probabilities of some words gets a
`LazyLogits` from the head instead. Slicing, reshaping and masking move row numbers about; scaling
and soft-cap are remembered; cross-entropy, log-softmax with gather, log-sum-exp, means and argmax
run through fastpo's head. Anything else computes the logits themselves, as the model would have,
and says so once for each operation.

    logits = LazyLogits.of(head, hidden)          # [..., V] of hidden [..., H]
    logits[:, :-1].log_softmax(-1).gather(-1, labels[..., None])
    logits.logps(labels), logits.stats(labels, "entropy"), logits.materialize()
    logits.base, logits.rows                      # for two heads side by side: hidden, weight, ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...ops.linear_logps import TokenStats
from ...ops.shards.gathered import HeadOptions, score
from ..adapter import is_adapter, operands
from .operators import Operators, leading_index, settle

_log = logging.getLogger(__name__)
_told: set[str] = set()
_OWN = HeadOptions()


@dataclass(eq=False)
class Base:
    """What all views of one call of the head share, and the log-probabilities known so far."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    adapter: tuple[Tensor, Tensor] | None  # [M, r], [V, r]
    labels: Tensor  # [M] of known log-probabilities, -1 where none is
    logps: Tensor  # [M]
    lse: Tensor  # [M]
    own: HeadOptions  # budget and backend
    known_for: Any = None  # which logits, and whether with gradient

    def remember(self, where: Tensor, labels: Tensor, logps: Tensor, lse: Tensor) -> None:
        """One word per row; of several the same one's, whichever it is, in all three."""
        if not len(where):
            return
        order = torch.full_like(self.labels, -1)
        order = order.index_copy(0, where, torch.arange(len(where), device=where.device))
        new, order = order >= 0, order.clamp(min=0)
        self.labels = torch.where(new, labels[order], self.labels)
        self.logps = torch.where(new, logps[order], self.logps)
        self.lse = torch.where(new, lse[order], self.lse)

    def select(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        down = self.adapter and (self.adapter[0].index_select(0, rows), self.adapter[1])
        return self.hidden.index_select(0, rows), down


@dataclass(frozen=True, eq=False, repr=False)
class LazyLogits(Operators):
    """Logits [*rows.shape, V]; `rows` are rows of the base, -1 where nothing is scored.

    z = outer·tanh(inner·x) when capped, else inner·x. normalized: log-softmax of it, times sign.
    """

    base: Base
    rows: Tensor
    dtype: torch.dtype
    inner: float = 1.0
    capped: bool = False
    outer: float = 1.0
    normalized: bool = False
    sign: float = 1.0

    @classmethod
    def of(
        cls, head: Any, hidden: Tensor, own: HeadOptions = _OWN, parts: Any = None
    ) -> LazyLogits:
        """Instead of `head(hidden)`, for a linear layer with or without LoRA.

        parts: weight and bias, where the layer's own will be gone when they are read.
        """
        hidden = hidden.to(head.weight.device)  # with a device_map the backbone may end elsewhere
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        flat = hidden.reshape(-1, hidden.shape[-1])
        # Dropout inside an adapter is drawn here, once.
        (weight, bias), adapter = parts or (head.weight, head.bias), None
        if is_adapter(head):
            weight, adapter = operands(head, flat)
        if torch.is_grad_enabled():
            # DDP follows the graph of what a forward returns, and only from tensors inside a graph:
            # a bare parameter would count as unused, and fail when its gradient comes all the same.
            weight, bias = weight.view_as(weight), None if bias is None else bias.view_as(bias)
        rows = torch.arange(len(flat), device=flat.device)
        zeros = flat.new_zeros(len(flat), dtype=torch.float32)
        base = Base(flat, weight, bias, adapter, torch.full_like(rows, -1), zeros, zeros, own)
        made = cls(base, rows.view(hidden.shape[:-1]), hidden.dtype)
        # Logits of a pass without gradient stay constants, wherever they are read.
        return made if torch.is_grad_enabled() else made.detach()

    # What a tensor says of itself

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, self.base.weight.shape[0]))

    @property
    def ndim(self) -> int:
        return self.rows.ndim + 1

    @property
    def device(self) -> torch.device:
        return self.base.hidden.device

    @property
    def requires_grad(self) -> bool:
        parts = (self.base.hidden, self.base.weight, self.base.bias, *(self.base.adapter or ()))
        return any(x is not None and x.requires_grad for x in parts)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[LazyLogits]:
        return (self._view(rows) for rows in self.rows)

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    # Views

    def _view(self, rows: Tensor) -> LazyLogits:
        return replace(self, rows=rows)

    def __getitem__(self, index: Any) -> Any:
        leading = leading_index(index, self.ndim)
        return (
            self._fallback("__getitem__", index)
            if leading is None
            else self._view(self.rows[leading])
        )

    def view(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not wanted or wanted[-1] != self.shape[-1]:
            return self._fallback("view", *shape)
        return self._view(self.rows.reshape(wanted[:-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim % self.ndim == self.ndim - 1:
            return self._fallback("flatten", start_dim, end_dim)
        return self._view(self.rows.flatten(start_dim, end_dim % self.ndim))

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        if dim % self.ndim == self.ndim - 1:
            return self._fallback("chunk", chunks, dim)
        return tuple(self._view(rows) for rows in self.rows.chunk(chunks, dim % self.ndim))

    def split(self, split_size: Any, dim: int = 0) -> Any:
        if dim % self.ndim == self.ndim - 1:
            return self._fallback("split", split_size, dim)
        return tuple(self._view(rows) for rows in self.rows.split(split_size, dim % self.ndim))

    def contiguous(self) -> LazyLogits:
        return self

    clone = contiguous

    def detach(self) -> LazyLogits:
        base = self.base
        constant = replace(base, hidden=base.hidden.detach(), weight=base.weight.detach(),
                           logps=base.logps.detach(), lse=base.lse.detach())  # fmt: skip
        if base.adapter is not None:
            constant.adapter = (base.adapter[0].detach(), base.adapter[1].detach())
        if base.bias is not None:
            constant.bias = base.bias.detach()
        return replace(self, base=constant)

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        """Another dtype is remembered; the device is that of the head."""
        wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
        return replace(self, dtype=wanted[0]) if wanted else self

    def float(self) -> LazyLogits:
        return replace(self, dtype=torch.float32)

    def only(self, scored: Tensor) -> LazyLogits:
        """Log-probabilities will be asked for, or count, at `scored` positions only."""
        return self._view(self.rows.masked_fill(~scored, -1))

    # Scale and soft-cap

    def _scaled(self, factor: Any, name: str) -> Any:
        if not isinstance(factor, int | float) or (self.normalized and factor != -1):
            return self._fallback(name, factor)
        if self.normalized:
            return replace(self, sign=-self.sign)
        if self.capped:
            if factor <= 0:  # no soft-cap that linear_logps knows
                return self._fallback(name, factor)
            return replace(self, outer=self.outer * factor)
        return replace(self, inner=self.inner * factor)

    def __mul__(self, factor: Any) -> Any:
        return self._scaled(factor, "__mul__")

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, int | float):
            return self._fallback("__truediv__", divisor)
        return self._scaled(1 / divisor, "__truediv__")

    div = __truediv__

    def __neg__(self) -> Any:
        return self._scaled(-1, "__mul__")

    def tanh(self) -> Any:
        if self.capped or self.normalized:
            return self._fallback("tanh")
        return replace(self, capped=True)

    # Numbers

    @property
    def options(self) -> HeadOptions:
        cap, scale = (self.outer, self.inner * self.outer) if self.capped else (None, self.inner)
        return replace(self.base.own, softcap=cap, logit_scale=scale)

    def stats(self, labels: Tensor, *outputs: str) -> TokenStats:
        """`linear_logps` of these rows; zeros where nothing is scored."""
        rows = self.rows.flatten()
        found = (rows >= 0).nonzero().squeeze(1)
        hidden, adapter = self.base.select(rows.index_select(0, found))
        stats = score(
            hidden,
            self.base.weight,
            self.base.bias,
            labels.to(rows.device).flatten().index_select(0, found),
            replace(self.options, outputs=("logps", *outputs)),
            adapter=adapter,
        )
        return TokenStats(*(_placed(x, found, self.rows) for x in stats))

    def logps(self, labels: Tensor) -> Tensor:
        """log softmax(z)[label] [*rows.shape], float32; what is known already is not computed."""
        return self._known(labels)[0]

    def lse(self) -> Tensor:
        """log Σ exp z [*rows.shape], float32; free where any log-probability is known."""
        return self._known(None)[1]

    def _known(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and log-sum-exp; without labels any word's log-probability will do."""
        if labels is None:
            known = self.base.labels[self.rows.clamp(min=0)]
            labels = known.clamp(min=0) if self.base.known_for == self._which() else known * 0
        if labels.shape != self.rows.shape:
            expected, got = tuple(self.rows.shape), tuple(labels.shape)
            raise ValueError(f"labels: expected shape {expected}, got {got}")
        base, rows = self.base, self.rows.flatten()
        labels = labels.to(rows.device).flatten()
        if base.known_for != self._which():
            base.known_for, base.labels = self._which(), torch.full_like(base.labels, -1)
            # FSDP2 casts outputs, these too, to the dtype of its mixed precision.
            zeros = torch.zeros_like(base.logps, dtype=torch.float32, requires_grad=False)
            base.logps = base.lse = zeros
        asked = (rows >= 0) & (base.labels[rows.clamp(min=0)] != labels)
        missing = asked.nonzero().squeeze(1)
        results = tuple(x[rows.clamp(min=0)] for x in (base.logps, base.lse))
        # Rows without a label have gradients, too, of zeros: a batch of padding must not fail.
        graph = self.requires_grad and torch.is_grad_enabled()
        if len(missing) or (graph and not base.logps.requires_grad):
            where = rows.index_select(0, missing)
            new = labels.index_select(0, missing)
            stats = self._view(where).stats(new, "lse")
            assert stats.logps is not None and stats.lse is not None
            # Straight into the results: a row may be asked for several words at once.
            pairs = zip(results, (stats.logps, stats.lse), strict=True)
            results = tuple(x.index_copy(0, missing, found) for x, found in pairs)
            base.remember(where, new, stats.logps, stats.lse)
        logps, lse = (x.masked_fill(rows < 0, 0).view(self.rows.shape) for x in results)
        return logps, lse

    def _which(self) -> tuple[Any, ...]:
        return self.inner, self.capped, self.outer, torch.is_grad_enabled()

    def means(self) -> Tensor:
        """Mean logit of every row [*rows.shape], with gradient, without products over words.

        Capped: a pass over the words where no gradient is needed, full logits where one is.
        """
        base, rows = self.base, self.rows.flatten().clamp(min=0)
        if self.capped and self.requires_grad and torch.is_grad_enabled():
            return self.real("mean").float().mean(-1)
        if self.capped:
            stats = self._view(rows).stats(torch.zeros_like(rows), "mean_logits")
            assert stats.mean_logits is not None
            return stats.mean_logits.view(self.rows.shape)
        hidden, adapter = base.select(rows)
        mean = hidden.float() @ base.weight.mean(0, dtype=torch.float32)  # no float32 copy of it
        if adapter is not None:
            mean = mean + adapter[0].float() @ adapter[1].mean(0, dtype=torch.float32)
        if base.bias is not None:
            mean = mean + base.bias.float().mean()
        return (mean * self.inner).view(self.rows.shape)

    def materialize(self) -> Tensor:
        """The logits, as the model would have made them."""
        hidden, adapter = self.base.select(self.rows.flatten().clamp(min=0))
        weight, bias = self.base.weight.to(hidden.dtype), self.base.bias
        x = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
        if adapter is not None:
            x = x + adapter[0].to(x.dtype) @ adapter[1].to(x.dtype).t()
        x = (x * self.inner).to(self.dtype)
        x = (x.tanh() * self.outer if self.capped else x).view(self.shape)
        return self.sign * x.log_softmax(-1) if self.normalized else x

    def real(self, name: str) -> Tensor:
        """The logits for an operation that cannot do without them, and a word about it."""
        _tell(name)
        return self.materialize()

    def _fallback(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.real(name), name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from .functions import METHODS

        if name in METHODS:
            return METHODS[name].__get__(self)
        if not hasattr(Tensor, name):  # asking for it must not cost the logits
            raise AttributeError(f"'LazyLogits' object has no attribute {name!r}")
        if name.endswith("_"):
            return getattr(settle(self, name), name)
        return getattr(self.real(name), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from .functions import FUNCTIONS

        kwargs = kwargs or {}
        if func in FUNCTIONS and isinstance(args[0] if args else None, LazyLogits):
            return FUNCTIONS[func](*args, **kwargs)
        _tell(getattr(func, "__name__", str(func)))
        real = tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs))
        return func(*real[0], **real[1])


def _tell(name: str) -> None:
    if name not in _told:
        _told.add(name)
        _log.warning("fastpo: %s is computed on full logits, which takes their memory", name)


def _placed(values: Tensor | None, where: Tensor, like: Tensor) -> Tensor | None:
    if values is None:
        return None
    return values.new_zeros(like.numel()).index_copy(0, where, values).view(like.shape)

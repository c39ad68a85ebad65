"""`multi_head_logps`: every token scored by a head of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear_logps import linear_logps
from .stats import TokenStats
from .walks.checks import (
    OUTPUTS,
    check_hidden,
    check_integer,
    check_whole,
    each_row,
    given,
    shape_of,
)
from .walks.derivatives import check_plain
from .walks.head import check_labels


def multi_head_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    heads: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    outputs: tuple[str, ...] = ("logps",),
    budget: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`linear_logps` of each token under head `heads[token]`, with gradient to all heads.

    Tokens are grouped by head and each group goes through `linear_logps` once, so the matrix
    products are those of one head. The sizes of the groups are needed on the host: give `heads`
    on the CPU, or the call waits for the device once to copy it.

    hidden: [..., H] float32, bfloat16 or float16.  weight, bias: [K, V, H] and [K, V].
    labels: [...] int64, in [0, V) or ignore_index; labels[i] is scored by hidden[i], unshifted.
    heads: [...] int64, in [0, K).
    temperature: a number, or one per token, [...].
    budget: bytes of probabilities that may be kept, per head.

    Raises ValueError as `linear_logps` does, and for heads outside [0, K), also where the label
    is ignore_index.
    """
    check_plain("multi_head_logps", (hidden, weight, labels, heads, bias))
    _check(hidden, weight, labels, heads, bias)
    _check_words(labels.reshape(-1), weight.shape[1], ignore_index)
    host = heads.reshape(-1).cpu()
    order, sizes = _grouped(host, weight.shape[0])
    places = torch.arange(len(order), dtype=torch.int64, device=order.device)
    back = torch.empty_like(order).scatter_(0, order, places)
    order, back = (x.to(hidden.device, non_blocking=True) for x in (order, back))
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, order).split(sizes)
    words = labels.reshape(-1).index_select(0, order).split(sizes)
    # unbind, whose backward stacks; indexing would add K gradients of the size of all heads.
    biases = [None] * len(sizes) if bias is None else bias.unbind()
    temperatures = _temperatures(temperature, labels, ignore_index, order, sizes)
    groups = [
        linear_logps(
            *operands,
            bias=offset,
            temperature=own,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            outputs=outputs,
            budget=budget,
            backend=backend,
        )
        for *operands, offset, own in zip(
            rows, weight.unbind(), words, biases, temperatures, strict=True
        )
    ]
    return TokenStats(
        **{
            name: torch.cat([getattr(group, name) for group in groups])
            .index_select(0, back)
            .view(labels.shape)
            for name in OUTPUTS
            if name in outputs
        }
    )


def _temperatures(
    temperature: float | Tensor,
    labels: Tensor,
    ignore_index: int | None,
    order: Tensor,
    sizes: list[int],
) -> Sequence[float | Tensor]:
    """Of each head's tokens."""
    if not isinstance(temperature, Tensor):
        return [temperature] * len(sizes)
    each = each_row(temperature, labels, ignore_index)
    return each.reshape(-1).index_select(0, order).split(sizes)


@torch.compiler.disable  # it reads them
def _check_words(labels: Tensor, vocab: int, ignore_index: int | None) -> None:
    """Here, since each head knows rows of its own only."""
    if ignore_index is not None:
        check_integer("ignore_index", ignore_index, "an integer or None")
    if labels.dtype == torch.int64:
        check_labels(labels, vocab, ignore_index)


@torch.compiler.disable  # how many there are is no constant
def _grouped(heads: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Tokens sorted by head, stably, and how many each head has; on the host."""
    wrong = (heads < 0) | (heads >= count)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"heads: expected values in [0, {count}), got {int(heads[row])} at row {row}"
        )
    return heads.argsort(stable=True), heads.bincount(minlength=count).tolist()


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, heads: Tensor, bias: Tensor | None
) -> None:
    """What `linear_logps` would say of a slice, said of what the caller gave."""
    check_whole(hidden=hidden, weight=weight, labels=labels, heads=heads, **given(bias=bias))
    check_hidden(hidden)
    if weight.dim() != 3 or 0 in weight.shape[:2] or weight.shape[2] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape (K, V, {hidden.shape[-1]}), got {shape_of(weight)}"
        )
    for name, x in {"labels": labels, "heads": heads}.items():
        if x.shape != hidden.shape[:-1]:
            raise ValueError(f"{name}: expected shape {shape_of(hidden)[:-1]}, got {shape_of(x)}")
    if heads.dtype != torch.int64:
        raise ValueError(f"heads: expected dtype torch.int64, got {heads.dtype}")
    if heads.device.type != "cpu" and heads.device != hidden.device:
        raise ValueError(f"heads: expected device cpu or {hidden.device}, got {heads.device}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected device {hidden.device}, got {labels.device}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias: expected shape {shape_of(weight)[:2]}, got {shape_of(bias)}")

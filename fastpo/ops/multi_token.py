"""`multi_token_logps`: several future tokens scored by one head, in one walk over its words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .linear_logps import linear_logps
from .stats import TokenStats
from .tiles.tiled import TileSource
from .walks.checks import check_integer, check_whole, shape_of
from .walks.derivatives import check_plain


def multi_token_logps(
    hidden_per_depth: Sequence[Tensor] | Tensor,
    weight: Tensor | TileSource,
    labels: Tensor,
    *,
    detach: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logps",),
    budget: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`linear_logps` of D depths of hidden states, [D, ..., T] each, as multi-token prediction has.

    Depth d scores at position t the label of position t + d; its last d positions have none and
    give 0. Depth 0 is `linear_logps`, whose labels are the next tokens already. All depths go
    through one walk, so the head is read once.

    hidden_per_depth: D of [..., T, H], float32, bfloat16 or float16.  weight, bias: [V, H] and [V].
    labels: [..., T] int64, in [0, V) or ignore_index. With a leading D they are taken as they are:
        where documents share a row, for instance, and a label must not be one of the next document.
    detach: hidden states that get no gradient, so that a depth trains the head alone; for all
        depths or each. What is to train a depth but not the trunk under it is detached before it.

    Everything else, errors too, as in `linear_logps`.
    """
    check_integer("ignore_index", ignore_index)
    if not isinstance(hidden_per_depth, Iterable):
        raise ValueError(f"hidden_per_depth: expected tensors, got {hidden_per_depth!r}")
    depths = list(hidden_per_depth)
    _check(depths, labels)
    check_plain("multi_token_logps", (*depths, labels, bias))
    cut = _flags(detach, len(depths))
    hidden = torch.stack([x.detach() if no else x for x, no in zip(depths, cut, strict=True)])
    if labels.dim() < hidden.dim() - 1:
        labels = shifted_labels(labels, len(depths), ignore_index)
    return linear_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        outputs=outputs,
        budget=budget,
        backend=backend,
    )


def shifted_labels(
    labels: Tensor,  # [..., T]
    depths: int,
    ignore_index: int,
) -> Tensor:  # [D, ..., T]
    """Of each depth: those of so many positions later."""
    T = labels.shape[-1]
    later = torch.nn.functional.pad(labels, (0, depths), value=ignore_index)
    return torch.stack([later[..., d : d + T] for d in range(depths)])


def _check(depths: Sequence[Any], labels: Tensor) -> None:
    if not depths:
        raise ValueError("hidden_per_depth: expected at least one depth, got none")
    check_whole(labels=labels, **{f"hidden_per_depth[{d}]": x for d, x in enumerate(depths)})
    first = depths[0]
    if first.dim() < 2:
        raise ValueError(f"hidden_per_depth[0]: expected shape (..., T, H), got {shape_of(first)}")
    for d, x in enumerate(depths):
        if x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"hidden_per_depth[{d}]: expected {first.dtype} of shape {shape_of(first)} on "
                f"{first.device} as depth 0, got {x.dtype} of {shape_of(x)} on {x.device}"
            )
    shapes = shape_of(first)[:-1], (len(depths), *shape_of(first)[:-1])
    if shape_of(labels) not in shapes:
        raise ValueError(
            f"labels: expected shape {shapes[0]} or {shapes[1]}, got {shape_of(labels)}"
        )
    if labels.dtype != torch.int64:  # in another one ignore_index may be no number
        raise ValueError(f"labels: expected dtype torch.int64, got {labels.dtype}")


def _flags(detach: Any, depths: int) -> list[bool]:
    found = [detach] * depths if isinstance(detach, bool) else detach
    plain = isinstance(found, (list, tuple)) and all(isinstance(x, bool) for x in found)
    if not plain or len(found) != depths:
        raise ValueError(f"detach: expected True, False or {depths} of them, got {detach!r}")
    return list(found)

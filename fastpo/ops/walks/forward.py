"""The forward: tokens outside, vocabulary inside, the same loops for every backend.

Nothing here reads a device value on the host, except the label check and compaction on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..products import addmm_
from ..rows import backend as R
from ..rows.torch import log_mass_of, logps_of
from . import anchored
from .backward import backward
from .head import (
    Adapted,
    Forward,
    Head,
    HeadSpec,
    check_labels,
    kept_shapes,
    tile_in,
)
from .logits import to_logits

__all__ = ["Adapted", "Forward", "HeadSpec", "backward", "fake_forward", "forward"]


def forward(
    hidden: Tensor, weight: Tensor | Adapted, bias: Tensor | None, labels: Tensor, spec: HeadSpec
) -> Forward:
    check_labels(labels, spec.vocab(weight), spec.ignore_index)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, labels, spec)
        state = _fresh(head)
        kept, anchors = head.room(hidden)
        frozen = head.plan.mode == "frozen"
        score_block, frozen_block = _score_block, _frozen_block
        if head.anchored:
            score_block, frozen_block = anchored.score_block, anchored.frozen_block
        shape = hidden.shape if frozen else (0, 0)
        direction = head.empty(*shape, dtype=_direction_dtype(hidden))
        for a, b in head.token_blocks():
            if frozen:
                frozen_block(head, state, direction, a, b)
            else:
                score_block(head, state, kept, anchors, a, b)
        return finish(head, state, len(labels))._replace(
            kept=kept, anchors=anchors, direction=_scatter_direction(head, direction)
        )


def _fresh(head: Head) -> Tensor:
    if head.anchored:  # which writes all that it will be asked for
        return head.empty(R.STATE, len(head.hidden), dtype=torch.float32)
    return R.filled_rows(R.INITIAL_STATE, len(head.hidden), head.device)


def fake_forward(hidden: Tensor, weight: Tensor, spec: HeadSpec) -> Forward:
    """The shapes of `forward`, for tracing."""
    size, anchors = kept_shapes(spec.plan(hidden, weight), spec, hidden, weight)
    frozen = spec.hidden_grad and not spec.head_grad
    return fake_finish(hidden, spec)._replace(
        kept=hidden.new_empty(size, dtype=spec.compute_dtype),
        anchors=hidden.new_empty(anchors, dtype=torch.float32),
        direction=hidden.new_empty(
            hidden.shape if frozen else (0, 0), dtype=_direction_dtype(hidden)
        ),
    )


def fake_finish(hidden: Tensor, spec: HeadSpec) -> Forward:
    """The shapes of `finish`."""
    fields = {name: hidden.new_empty(0, dtype=torch.float32) for name in Forward._fields}
    for name in ("target", "maximum", "log_mass", "logps", "lse", *spec.outputs):
        dtype = torch.bool if name == "is_top1" else torch.float32
        fields[name] = hidden.new_empty(hidden.shape[0], dtype=dtype)
    return Forward(**fields)


def _direction_dtype(hidden: Tensor) -> torch.dtype:
    """float16 would lose it before the gradient of a scaled loss is there to lift it."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _score_block(head: Head, state: Tensor, kept: Tensor, anchors: Tensor, a: int, b: int) -> None:
    for _ in folded_tiles(head, state, kept, anchors, a, b):
        pass
    head.merge(state[:, a:b])


def folded_tiles(
    head: Head, state: Tensor, kept: Tensor, anchors: Tensor, a: int, b: int
) -> Iterator[tuple[int, Tensor]]:
    """First word and raw products of each tile of a block, once `state` holds it."""
    x, K = head.block(a, b), head.plan.kept_tokens
    split = min(max(K, a), b)
    for i, v0, v1 in head.vocab_tiles():
        tile = head.products(x, head.words(v0, v1))
        if split > a:
            stored = head.stored(kept, i, v0, v1)[a:split]
            _fold(head, tile[: split - a], v0, state, a, split, stored, anchors[i, a:split])
        if split < b:
            _fold(head, tile[split - a :], v0, state, split, b)
        yield v0, tile


def _fold(
    head: Head,
    tile: Tensor,
    first: int,
    state: Tensor,
    a: int,
    b: int,
    kept: Tensor | None = None,
    anchors: Tensor | None = None,
    fold_cap: bool = False,
) -> None:
    bias, logit_map = head.bias, head.logit_map.rows(a, b)
    if head.mask is not None:
        restrict(head, tile, first, state, a, b)
        bias, logit_map = None, R.LogitMap()
    head.kernels.forward(
        tile,
        first,
        head.labels[a:b],
        bias,
        state[:, a:b],
        logit_map,
        head.spec.stats,
        kept,
        anchors,
        fold_cap,
    )


def restrict(head: Head, tile: Tensor, first: int, state: Tensor, a: int, b: int) -> None:
    """Raw products of rows a to b to logits, -inf where a word does not count.

    After the soft-cap, which would make a finite number of it.
    """
    assert head.mask is not None
    z = to_logits(tile, first, head.bias, head.logit_map.rows(a, b))
    left_out = ~head.mask.allowed(a, b, first, first + tile.shape[1])
    if "mean_logits" in head.spec.outputs:
        state[R.SUM, a:b] += z.masked_fill(left_out, 0.0).sum(1)
    z.masked_fill_(left_out, float("-inf"))


def _frozen_block(head: Head, state: Tensor, direction: Tensor, a: int, b: int) -> None:
    """d logp / d hidden of rows a to b: the second product, inside the forward."""
    x = head.block(a, b)
    total = torch.zeros(b - a, x.shape[1], dtype=torch.float32, device=head.device)
    before, anchor = head.empty(2, b - a, dtype=torch.float32)
    buffer = None
    if head.gemm != torch.float32:
        buffer = head.empty(head.tile_cells, dtype=head.gemm)
    for _, v0, v1 in head.vocab_tiles():
        words = head.words(v0, v1)
        tile = head.products(x, words)
        e = tile if buffer is None else tile_in(buffer, *tile.shape)
        _fold(head, tile, v0, state, a, b, e, anchor, fold_cap=True)
        if v0 > 0:
            head.kernels.rescale(total, before, anchor)
        addmm_(total, e, words)
        before, anchor = anchor, before
    block = state[:, a:b]
    head.merge(block)
    if head.plan.vocab:  # else nobody has written `before`
        # Σ over the others of p_v·dz/dx·W_v
        total.mul_(torch.exp(before - block[R.MAX] - log_mass_of(block)).unsqueeze(1))
    _write_direction(head, block, total, a, b, direction)


def _write_direction(
    head: Head, state: Tensor, weighted: Tensor, a: int, b: int, direction: Tensor
) -> None:
    """d logp / d hidden = dz/dx·(1 - p_y)·W_y - Σ over the others of p_v·dz/dx·W_v."""
    logit_map = head.logit_map.rows(a, b)
    # The clamp keeps the lookup inside the weight where a label is another process's, or nobody's:
    # then its log-probability is NaN.
    labels = head.labels[a:b]
    here = labels.clamp(0, head.plan.vocab - 1)
    own = -torch.expm1(logps_of(state)) * logit_map.cap_slope(state[R.TARGET])
    if head.spec.shard is not None:
        own = own.where(here == labels, 0)
    if head.plan.vocab:
        own = head.weight.index_select(0, here).float().mul_(own.unsqueeze(1))
    else:  # of a head in shards, whose words are all in other processes
        own = torch.zeros_like(weighted)
    own = head.sum_over_shards(own.sub_(weighted))
    direction[a:b] = own.mul_(logit_map.tempered(logit_map.factor, own))


def _scatter_direction(head: Head, direction: Tensor) -> Tensor:
    if direction.numel() == 0:
        return direction
    if head.ignored is not None:
        return direction.masked_fill_(head.ignored.unsqueeze(1), 0)
    if head.rows is None:
        return direction
    compact = direction[: len(head.rows)].clone()
    return direction.zero_().index_copy_(0, head.rows, compact)


def finish(head: Head, state: Tensor, tokens: int) -> Forward:
    outputs = head.spec.outputs
    stats = tuple(name for name in outputs if name in R.STATS and name != "mean_logits")
    values = head.kernels.finish(state, stats, head.ignored)
    if "mean_logits" in outputs:
        words = head.spec.vocab(head.weight) if head.mask is None else head.mask.counts
        mean = state[R.SUM] / words
        values["mean_logits"] = mean if head.ignored is None else mean.masked_fill(head.ignored, 0)
    fields = {name: head.spread(value, tokens) for name, value in values.items()}
    # One empty tensor each: a custom operator may not return the same one twice.
    absent = {name: state.new_empty(0) for name in Forward._fields if name not in fields}
    return Forward(**fields, **absent)

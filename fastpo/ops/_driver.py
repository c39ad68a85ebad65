"""The loops around the matrix products, the same for every backend.

Forward walks tokens outside and vocabulary inside; the backward walks vocabulary outside, so that
each slice of d weight is complete, and rounded once, when the walk leaves it.
Nothing here reads a device value on the host, except the label check and compaction on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import planner
from . import _rows as R


@dataclass(frozen=True)
class HeadSpec:
    """All that is not a tensor in one call of the head."""

    logit_map: R.LogitMap
    ignore_index: int | None
    outputs: tuple[str, ...]
    compute_dtype: torch.dtype
    backend: str
    hidden_grad: bool
    head_grad: bool
    budget: int | None

    def plan(self, tokens: int, vocab: int, hidden: int, device_type: str) -> planner.Plan:
        return planner.make_plan(
            tokens,
            vocab,
            hidden,
            compute_dtype=self.compute_dtype,
            device_type=device_type,
            hidden_grad=self.hidden_grad,
            head_grad=self.head_grad,
            budget=self.budget,
        )

    @property
    def stats(self) -> int:
        return sum(bit for name, bit in R.STATS.items() if name in self.outputs)


class Forward(NamedTuple):
    """Per-token results over all N rows, and what the backward wants; absent ones are empty.

    kept: for each vocabulary tile a contiguous [kept_tokens, words] block, one after the other.
    anchors: [vocabulary tiles, kept_tokens].  direction: [N, H] d logp / d hidden.
    """

    logps: Tensor
    lse: Tensor
    maximum: Tensor
    log_mass: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    kept: Tensor
    anchors: Tensor
    direction: Tensor


class _Head:
    """One call's operands: compacted hidden states and labels, tiles in the dtype of the products."""

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [N]
        spec: HeadSpec,
    ) -> None:
        self.device = hidden.device
        self.rows = _scored_rows(labels, spec.ignore_index)
        self.ignored = None
        if self.rows is not None:
            hidden, labels = hidden.index_select(0, self.rows), labels.index_select(0, self.rows)
        elif spec.ignore_index is not None and self.device.type != "cpu":
            # Counting the scored rows would wait for the device; a row that is not scored must
            # still not reach d weight with a NaN of its own.
            self.ignored = labels == spec.ignore_index
            hidden = hidden.masked_fill(self.ignored.unsqueeze(1), 0)
        self.hidden, self.weight, self.labels = hidden, weight, labels.contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.spec = spec
        self.kernels = R.load(spec.backend)
        self.plan = spec.plan(len(hidden), *weight.shape, self.device.type)
        self.gemm = planner.gemm_dtype(spec.compute_dtype, self.device.type)
        tiles = self.plan.tiles
        self._tile = self.empty(tiles.tokens * tiles.vocab, dtype=torch.float32)
        # Converted copies live in one buffer each, written again only when the walk moves on.
        convert = hidden.dtype != self.gemm
        self._block = self.empty(tiles.tokens * convert, hidden.shape[1], dtype=self.gemm)
        convert = weight.dtype != self.gemm
        self._words = self.empty(tiles.vocab * convert, hidden.shape[1], dtype=self.gemm)
        self._converted: tuple[int, int] | None = None

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def token_blocks(self) -> Iterator[tuple[int, int]]:
        step = self.plan.tiles.tokens
        return ((a, min(a + step, len(self.hidden))) for a in range(0, len(self.hidden), step))

    def vocab_tiles(self) -> Iterator[tuple[int, int, int]]:
        step, vocab = self.plan.tiles.vocab, self.plan.vocab
        return ((i, v, min(v + step, vocab)) for i, v in enumerate(range(0, vocab, step)))

    def block(self, a: int, b: int) -> Tensor:  # [b - a, H]
        if self.hidden.dtype == self.gemm:
            return self.hidden[a:b]
        start = a // self.plan.tiles.tokens * self.plan.tiles.tokens
        stop = min(start + self.plan.tiles.tokens, len(self.hidden))
        if self._converted != (start, stop):
            self._block[: stop - start].copy_(self.hidden[start:stop])
            self._converted = (start, stop)
        return self._block[a - start : b - start]

    def words(self, v0: int, v1: int) -> Tensor:  # [v1 - v0, H]
        words = self.weight[v0:v1]
        return words if words.dtype == self.gemm else self._words[: v1 - v0].copy_(words)

    def products(self, x: Tensor, words: Tensor) -> Tensor:
        """x·wordsᵀ in float32, in the one buffer all tiles share."""
        tile = self._tile[: len(x) * len(words)].view(len(x), len(words))
        return _mm_float32(x, words.t(), tile)


def _scored_rows(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Rows to compact to; None when all are scored, or when counting would wait for a device."""
    if labels.device.type != "cpu" or ignore_index is None:
        return None
    scored = labels != ignore_index
    return None if bool(scored.all()) else scored.nonzero().squeeze(1)


def _mm_float32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm_float32(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a·b, accumulated and kept in float32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def check_labels(labels: Tensor, vocab: int, ignore_index: int | None) -> None:
    """On a CPU a label outside the vocabulary raises; elsewhere its row becomes NaN, unread."""
    if labels.device.type != "cpu":
        return
    wrong = (labels < 0) | (labels >= vocab)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        allowed = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise ValueError(
            f"labels: expected values in [0, {vocab}){allowed}, got {int(labels[row])} at row {row}"
        )


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, spec: HeadSpec
) -> Forward:
    check_labels(labels, weight.shape[0], spec.ignore_index)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, labels, spec)
        state = torch.tensor(R.INITIAL_STATE, device=head.device).unsqueeze(1)
        state = state.repeat(1, len(head.hidden))
        kept_size, anchors_shape = kept_shapes(spec, hidden, weight)
        kept = head.empty(kept_size, dtype=spec.compute_dtype)
        anchors = head.empty(*anchors_shape, dtype=torch.float32)
        frozen = head.plan.mode == "frozen"
        direction = head.empty(*(hidden.shape if frozen else (0, 0)), dtype=hidden.dtype)
        weighted = head.hidden.new_empty(0)
        for a, b in head.token_blocks():
            if frozen:
                weighted = _frozen_block(head, state, a, b)
                _write_direction(head, state[:, a:b], weighted, a, b, direction)
            else:
                _score_block(head, state, kept, anchors, a, b)
        return _finish(head, state, len(labels))._replace(
            kept=kept, anchors=anchors, direction=_scatter_direction(head, direction)
        )


def kept_shapes(spec: HeadSpec, hidden: Tensor, weight: Tensor) -> tuple[int, tuple[int, int]]:
    """Size of `kept` and shape of `anchors` as if all rows were scored.

    So the shapes are known without reading the labels; memory never written is never committed.
    """
    plan = spec.plan(len(hidden), *weight.shape, hidden.device.type)
    return plan.kept_tokens * plan.vocab, (-(-plan.vocab // plan.tiles.vocab), plan.kept_tokens)


def fake_forward(hidden: Tensor, weight: Tensor, spec: HeadSpec) -> Forward:
    """The shapes of `forward`, for tracing."""
    n = hidden.shape[:1]
    row = hidden.new_empty(n, dtype=torch.float32)
    fields = {name: hidden.new_empty(0, dtype=torch.float32) for name in Forward._fields}
    for name in ("maximum", "log_mass", *spec.outputs):
        fields[name] = torch.empty_like(row, dtype=torch.bool if name == "is_top1" else None)
    fields["logps"], fields["lse"] = torch.empty_like(row), torch.empty_like(row)
    size, anchors = kept_shapes(spec, hidden, weight)
    frozen = spec.hidden_grad and not spec.head_grad
    return Forward(**fields)._replace(
        kept=hidden.new_empty(size, dtype=spec.compute_dtype),
        anchors=hidden.new_empty(anchors, dtype=torch.float32),
        direction=hidden.new_empty(hidden.shape if frozen else (0, 0)),
    )


def _score_block(
    head: _Head, state: Tensor, kept: Tensor, anchors: Tensor, a: int, b: int
) -> None:
    x, K = head.block(a, b), head.plan.kept_tokens
    split = min(max(K, a), b)
    for i, v0, v1 in head.vocab_tiles():
        tile = head.products(x, head.words(v0, v1))
        if split > a:
            stored = kept[K * v0 : K * v1].view(K, v1 - v0)[a:split]
            _fold(head, tile[: split - a], v0, state, a, split, stored, anchors[i, a:split])
        if split < b:
            _fold(head, tile[split - a :], v0, state, split, b)


def _fold(
    head: _Head,
    tile: Tensor,
    first: int,
    state: Tensor,
    a: int,
    b: int,
    kept: Tensor | None = None,
    anchors: Tensor | None = None,
    fold_cap: bool = False,
) -> None:
    spec = head.spec
    head.kernels.forward(
        tile,
        first,
        head.labels[a:b],
        head.bias,
        state[:, a:b],
        spec.logit_map,
        spec.stats,
        kept,
        anchors,
        fold_cap,
    )


def _frozen_block(head: _Head, state: Tensor, a: int, b: int) -> Tensor:
    """Σ over the others of p_v·dz/dx·W_v [b - a, H]: the second product, inside the forward."""
    x = head.block(a, b)
    total = torch.zeros(b - a, x.shape[1], dtype=torch.float32, device=head.device)
    anchor = head.empty(b - a, dtype=torch.float32)
    previous = torch.full_like(anchor, float("-inf"))
    buffer = None
    if head.gemm != torch.float32:
        buffer = head.empty(head._tile.numel(), dtype=head.gemm)
    for _, v0, v1 in head.vocab_tiles():
        words = head.words(v0, v1)
        tile = head.products(x, words)
        e = tile if buffer is None else buffer[: tile.numel()].view_as(tile)
        _fold(head, tile, v0, state, a, b, e, anchor, fold_cap=True)
        total.mul_(torch.exp(previous - anchor).unsqueeze(1))
        _addmm_float32(total, e, words)
        previous.copy_(anchor)
    block = state[:, a:b]
    return total.mul_(torch.exp(anchor - block[R.MAX] - _log_mass(block)).unsqueeze(1))


def _write_direction(
    head: _Head, state: Tensor, weighted: Tensor, a: int, b: int, direction: Tensor
) -> None:
    """d logp / d hidden = dz/dx·(1 - p_y)·W_y - Σ over the others of p_v·dz/dx·W_v."""
    logit_map = head.spec.logit_map
    # The clamp only keeps a poisoned row's lookup inside the weight; its log-probability is NaN.
    labels = head.labels[a:b].clamp(0, head.plan.vocab - 1)
    own = -torch.expm1(_logps(state)) * logit_map.cap_slope(state[R.TARGET])
    own = head.weight.index_select(0, labels).float().mul_(own.unsqueeze(1))
    direction[a:b] = own.sub_(weighted).mul_(logit_map.factor)


def _scatter_direction(head: _Head, direction: Tensor) -> Tensor:
    if direction.numel() == 0:
        return direction
    if head.ignored is not None:
        return direction.masked_fill_(head.ignored.unsqueeze(1), 0)
    if head.rows is None:
        return direction
    compact = direction[: len(head.rows)].clone()
    return direction.zero_().index_copy_(0, head.rows, compact)


def _logps(state: Tensor) -> Tensor:
    """-log(1 + mass of the others / mass of the label): no cancellation however peaked."""
    gap = state[R.MAX] - state[R.TARGET] + state[R.OTHERS].log()
    return -torch.logaddexp(gap, torch.zeros_like(gap))


def _log_mass(state: Tensor) -> Tensor:
    """log Σ exp(z - m) over all words."""
    own = torch.exp(state[R.TARGET] - state[R.MAX])
    others = state[R.OTHERS]
    peaked = state[R.TARGET] == state[R.MAX]
    return torch.where(peaked, others.log1p(), (others + own).log())


def _finish(head: _Head, state: Tensor, tokens: int) -> Forward:
    outputs = head.spec.outputs
    m, target = state[R.MAX], state[R.TARGET]
    logps = _logps(state)
    own = torch.exp(target - m)  # mass of the label beside the others', in units of exp(m)
    mass = state[R.OTHERS] + own
    log_mass = _log_mass(state)
    values = {"logps": logps, "lse": m + log_mass, "maximum": m.clone(), "log_mass": log_mass}
    if "entropy" in outputs:
        moment = state[R.MOMENT] + own * (target - m).clamp_min(R.LOG_FLOOR)
        values["entropy"] = (log_mass - moment / mass).clamp_min(0)
    if "log_sum_sq_probs" in outputs:
        values["log_sum_sq_probs"] = (state[R.SQUARES] + own.square()).log() - 2 * log_mass
    if "mean_logits" in outputs:
        values["mean_logits"] = state[R.SUM] / head.plan.vocab
    if "is_top1" in outputs:
        values["is_top1"] = (target >= m) & (target > state[R.BEFORE])
    # One empty tensor each: a custom operator may not return the same one twice.
    fields = {name: state.new_empty(0) for name in Forward._fields}
    fields.update((name, _spread(head, value, tokens)) for name, value in values.items())
    return Forward(**fields)


def _spread(head: _Head, value: Tensor, tokens: int) -> Tensor:
    """Back to all N rows, 0 where ignored."""
    if head.ignored is not None:
        return value.masked_fill(head.ignored, 0)
    if head.rows is None:
        return value
    return value.new_zeros(tokens).index_copy_(0, head.rows, value)


def backward(
    grad_logps: Tensor | None,  # [N] float32
    grad_entropy: Tensor | None,  # [N]
    grad_lse: Tensor | None,  # [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    saved: Forward,
    spec: HeadSpec,
    needs: tuple[bool, bool, bool],  # d hidden, d weight, d bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        frozen = saved.direction.numel() > 0
        if frozen and grad_entropy is None and grad_lse is None:
            g = torch.zeros_like(saved.logps) if grad_logps is None else grad_logps
            return (saved.direction * g.float().unsqueeze(1)).to(hidden.dtype), None, None
        # The forward kept nothing for these terms: recompute all logits.
        head = _Head(hidden, weight, bias, labels, replace(spec, budget=0) if frozen else spec)
        grads = _row_grads(head, grad_logps, grad_entropy, grad_lse, saved)
        return _Backward(head, grads, saved, grad_entropy is not None, needs).run(len(hidden))


def _row_grads(
    head: _Head,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    saved: Forward,
) -> Tensor:
    """The four numbers per row that the row kernel needs, [GRADS, n]."""

    def compact(x: Tensor | None) -> Tensor:
        x = torch.zeros_like(saved.logps) if x is None else x.float()
        return x if head.rows is None else x.index_select(0, head.rows)

    logps, shift, log_mass = map(compact, (saved.logps, saved.maximum, saved.log_mass))
    g, g_entropy, g_lse = compact(grad_logps), compact(grad_entropy), compact(grad_lse)
    entropy = compact(saved.entropy if saved.entropy.numel() else None)
    logit_map = head.spec.logit_map
    target = logps + log_mass + shift
    # d loss / d z_v = p_v·(common - g_entropy·log p_v), and at the label + g
    common = g_lse - g - g_entropy * entropy
    at_label = -g * torch.expm1(logps) + logps.exp() * (g_lse - g_entropy * (logps + entropy))
    at_label = at_label * logit_map.cap_slope(target) * logit_map.factor
    grads = torch.stack((shift, log_mass, common, g_entropy, at_label))
    if head.ignored is not None:
        # exp(z - inf) = 0 and zero coefficients: nothing of the row is left.
        grads.masked_fill_(head.ignored, 0)
        grads[R.LOG_MASS].masked_fill_(head.ignored, float("inf"))
    return grads


class _Backward:
    """The walk that turns row gradients into d hidden, d weight and d bias."""

    def __init__(
        self,
        head: _Head,
        grads: Tensor,
        saved: Forward,
        entropy_grad: bool,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.head, self.grads, self.saved, self.entropy_grad = head, grads, saved, entropy_grad
        n, (V, H) = len(head.hidden), head.weight.shape
        self.dhidden = torch.zeros(n, H, device=head.device) if needs[0] else None
        self.dweight = torch.empty_like(head.weight) if needs[1] else None
        self.dbias = torch.zeros(V, device=head.device) if needs[2] else None
        self.in_place = n <= head.plan.tiles.tokens and head.weight.dtype == head.gemm
        self._dx = head.empty(head._tile.numel(), dtype=head.gemm)

    def run(self, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        head = self.head
        for i, v0, v1 in head.vocab_tiles():
            words, slab = head.words(v0, v1), self._slab(v0, v1)
            for a, b in head.token_blocks():
                dx = self._dproducts(i, v0, v1, a, b, words)
                if self.dhidden is not None:
                    _addmm_float32(self.dhidden[a:b], dx, words)
                if slab is not None:
                    self._accumulate(slab, dx, head.block(a, b))
                if self.dbias is not None:
                    self.dbias[v0:v1] += dx.sum(0, dtype=torch.float32)
            if self.dweight is not None and slab is not None and not self.in_place:
                self.dweight[v0:v1] = slab
        if self.dweight is not None and not len(head.hidden):
            self.dweight.zero_()
        return self._dhidden(tokens), self.dweight, self.dbias

    def _slab(self, v0: int, v1: int) -> Tensor | None:
        """Where d weight of these words is summed: in place when one product completes it."""
        if self.dweight is None:
            return None
        target = self.dweight[v0:v1]
        return target if self.in_place else torch.zeros_like(target, dtype=torch.float32)

    def _accumulate(self, slab: Tensor, dx: Tensor, x: Tensor) -> None:
        if self.in_place:
            torch.mm(dx.t(), x, out=slab)
        else:
            _addmm_float32(slab, dx.t(), x)

    def _dproducts(self, i: int, v0: int, v1: int, a: int, b: int, words: Tensor) -> Tensor:
        """d loss / d products of one tile [b - a, v1 - v0]: kept rows first, then recomputed."""
        head, K = self.head, self.head.plan.kept_tokens
        dx = self._dx[: (b - a) * (v1 - v0)].view(b - a, v1 - v0)
        split = min(max(K, a), b)
        if split > a:
            stored = self.saved.kept[K * v0 : K * v1].view(K, v1 - v0)[a:split]
            self._turn(stored, self.saved.anchors[i, a:split], v0, a, split, dx[: split - a])
        if split < b:
            tile = head.products(head.block(split, b), words)
            self._turn(tile, None, v0, split, b, dx[split - a :])
        return dx

    def _turn(
        self, source: Tensor, anchors: Tensor | None, first: int, a: int, b: int, out: Tensor
    ) -> None:
        head = self.head
        head.kernels.backward(
            source,
            anchors,
            first,
            head.labels[a:b],
            head.bias,
            self.grads[:, a:b],
            head.spec.logit_map,
            self.entropy_grad,
            out,
        )

    def _dhidden(self, tokens: int) -> Tensor | None:
        if self.dhidden is None:
            return None
        dhidden = self.dhidden.to(self.head.hidden.dtype)
        if self.head.rows is None:
            return dhidden
        return dhidden.new_zeros(tokens, dhidden.shape[1]).index_copy_(0, self.head.rows, dhidden)

"""One call of the head: its options, its operands cut into tiles, its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ... import planner
from ..products import mm_rows_
from ..rows import backend as R
from ..rows import registry
from ..tiles.tiled import Tiled
from .checks import check_memory
from .logits import nan_where_infinite
from .mask import WordMask

if TYPE_CHECKING:
    from .vocab_shard import VocabShard


# The interpreter multiplies float32 only.
_ANCHORED_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


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
    # d weight may take the place of what is kept; then a second backward recomputes.
    lends: bool = False
    shard: VocabShard | None = None  # of which the weight holds the words
    anchors: bool = False  # the walk may be that of anchored.py
    mask: WordMask | None = None  # the words that count in each row

    def anchored(self, device: torch.device, weight: Tensor | Adapted) -> bool:
        """Whether exponentials are taken beside each row's label, in the product's epilogue.

        The one place that chooses between this walk and the classic one, which has float32, which
        cuBLAS multiplies faster, float16, which holds no exponential above 2**16, soft-caps, whose
        tanh is more than an epilogue can hide, temperatures and words of each row's own, and words
        that are not here as they are multiplied.
        """
        served = self.compute_dtype == _ANCHORED_DTYPES.get(device.type)
        whole = isinstance(weight, Tensor) and self.shard is None
        whole = whole and not isinstance(weight, Tiled)
        named = self.anchors and self.backend in ("anchored", "cutlass")
        plain = self.logit_map.softcap is None and self.logit_map.inverse is None
        plain = plain and self.mask is None
        return named and served and whole and plain

    def plan(self, hidden: Tensor, weight: Tensor | Adapted) -> planner.Plan:
        # Not len(), here and in all that a fake tensor goes through: in a compiled graph it would
        # turn the number of tokens into a constant, and another one compile again.
        return planner.make_plan(
            hidden.shape[0],
            weight.shape[0],
            weight.shape[1],
            compute_dtype=self.compute_dtype,
            device=hidden.device,
            hidden_grad=self.hidden_grad,
            head_grad=self.head_grad,
            budget=self.budget,
            dweight_bytes=_bytes(weight) if self.lends else 0,
            anchored=self.anchored(hidden.device, weight),
        )

    def vocab(self, weight: Tensor | Adapted) -> int:
        """Of all processes."""
        return weight.shape[0] if self.shard is None else self.shard.vocab

    @property
    def stats(self) -> int:
        """What the row kernels add up; a sum of z over masked words is not theirs, see restrict."""
        own = self.outputs if self.mask is None else set(self.outputs) - {"mean_logits"}
        return sum(bit for name, bit in R.STATS.items() if name in own)


class Forward(NamedTuple):
    """Per-token results over all N rows, and what the backward wants; absent ones are empty.

    kept: exponentials of `plan.block_words` words each as a contiguous [kept_tokens, words] block,
        one after the other, the last one where `kept` ends.
    anchors: [blocks, kept_tokens] with z = log(kept) + anchor; of the anchored walk [1, N] with
        p = kept·anchor, or p = exp(z - maximum)·anchor of rows not kept.
    direction: [N, H] d logp / d hidden, of float16 hidden states in float32.
    """

    logps: Tensor
    lse: Tensor
    target: Tensor
    maximum: Tensor
    log_mass: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    kept: Tensor
    anchors: Tensor
    direction: Tensor


def beside(*parts: Tensor) -> Tensor:
    """Columns side by side; autocast refuses to concatenate 16 bits of the other kind."""
    kind = parts[0].device.type
    known = torch.amp.is_autocast_available(kind)  # not of tensors without memory
    with torch.autocast(kind, enabled=False) if known else nullcontext():
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class Adapted:
    """A head [V, H + r]: `weight` [V, H] and an adapter's `up` [V, r], joined tile by tile.

    Its hidden states carry the adapter's own r values behind theirs. trained: the columns whose
    gradient is wanted; products for the others are left out.
    """

    weight: Tensor
    up: Tensor
    trained: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1] + self.up.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def __getitem__(self, words: slice) -> Tensor:
        return torch.cat((self.weight[words], self.up[words].to(self.dtype)), 1)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        parts = (self.weight.index_select(dim, index), self.up.index_select(dim, index))
        return torch.cat((parts[0], parts[1].to(self.dtype)), 1)


# Blocks of kept probabilities start at multiples of so many cells, as they would in a buffer of
# their own.
_ALIGNMENT = 64


class Head:
    """One call's operands: compacted tokens, and tiles in the dtype of the products."""

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor | Adapted,  # [V, H]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [N]
        spec: HeadSpec,
    ) -> None:
        self.device = hidden.device
        self.rows = scored_rows(labels, spec.ignore_index)
        self.ignored = None
        if self.rows is not None:
            hidden, labels = hidden.index_select(0, self.rows), labels.index_select(0, self.rows)
        elif spec.ignore_index is not None and self.device.type != "cpu":
            # Counting the scored rows would wait for the device; a row that is not scored must
            # still not reach d weight with a NaN of its own.
            self.ignored = labels == spec.ignore_index
            hidden = hidden.masked_fill(self.ignored.unsqueeze(1), 0)
        hidden = nan_where_infinite(hidden, spec.logit_map)
        if spec.shard is not None:
            labels = labels - spec.shard.first  # outside [0, rows of the weight) it is no word here
        self.hidden, self.weight, self.labels = hidden, weight, labels.contiguous()
        # Kernels read memory, where a negated view has the other sign.
        self.bias = None if bias is None else bias.float().contiguous().resolve_neg()
        self.trained = weight.trained if isinstance(weight, Adapted) else slice(None)
        self.spec, self.logit_map, self.mask = spec, spec.logit_map, spec.mask
        if self.mask is not None and self.rows is not None:
            self.mask = self.mask.select(self.rows)
        if self.logit_map.inverse is not None:
            self.logit_map = replace(self.logit_map, inverse=self.compact(self.logit_map.inverse))
        self.kernels = registry.kernels(spec.backend)
        self.plan = spec.plan(hidden, weight)
        self.anchored = spec.anchored(self.device, weight)
        operands = (hidden.dtype, weight.dtype)
        self.gemm = planner.gemm_dtype(spec.compute_dtype, self.device.type, *operands)
        tiles = self.plan.tiles
        self.tile_cells = tiles.cells
        # Converted copies live in one buffer each, written again only when the walk moves on.
        convert = hidden.dtype != self.gemm
        self._block = self.empty(tiles.tokens * convert, hidden.shape[1], dtype=self.gemm)
        convert = weight.dtype != self.gemm
        words = self.plan.vocab if self.anchored else tiles.vocab
        self._words = self.empty(words * convert, hidden.shape[1], dtype=self.gemm)
        self._converted: tuple[int, int] | None = None

    @cached_property
    def _tile(self) -> Tensor:
        return self.empty(self.tile_cells, dtype=torch.float32)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        """To sum in: float32 whatever PyTorch's default dtype is."""
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def token_blocks(self) -> Iterator[tuple[int, int]]:
        step = self.plan.tiles.tokens
        return ((a, min(a + step, len(self.hidden))) for a in range(0, len(self.hidden), step))

    def vocab_tiles(self, width: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Block of `kept`, first word, the one after the last; no tile reaches beyond a block."""
        vocab, block, step = self.plan.vocab, self.plan.block_words, width or self.plan.tiles.vocab
        for i, first in enumerate(range(0, vocab, block)):
            last = min(first + block, vocab)
            yield from ((i, v, min(v + step, last)) for v in range(first, last, step))

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

    def room(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """For `Forward.kept` and `Forward.anchors` of all rows."""
        plan = self.plan if self.rows is None else self.spec.plan(hidden, self.weight)
        size, shape = kept_shapes(plan, self.spec, hidden, self.weight)
        anchors = self.empty(*shape, dtype=torch.float32)
        return self.empty(size, dtype=self.spec.compute_dtype), anchors

    def kept_cells(self, kept: Tensor) -> Tensor:
        size = self.plan.kept_tokens * self.plan.row_words
        return kept[(len(kept) - size) // _ALIGNMENT * _ALIGNMENT :][:size]

    def stored(self, kept: Tensor, i: int, v0: int, v1: int) -> Tensor:  # [kept_tokens, v1 - v0]
        """Words of the i-th block of `kept`."""
        K, row = self.plan.kept_tokens, planner.row_cells(self.plan.block_words)
        width = min(row, self.plan.row_words - i * row)
        block = self.kept_cells(kept)[K * i * row : K * (i * row + width)].view(K, width)
        first = i * self.plan.block_words
        return block[:, v0 - first : v1 - first]

    def compact(self, x: Tensor) -> Tensor:
        """A number per token, of the scored ones."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def spread(self, x: Tensor, tokens: int) -> Tensor:
        """Of the scored tokens back to all, 0 in those that were left out."""
        if self.rows is None:
            return x
        return x.new_zeros(tokens, *x.shape[1:]).index_copy_(0, self.rows, x)

    def merge(self, state: Tensor) -> None:
        """`state` of a block once all words of this process are folded."""
        if self.spec.shard is not None:
            self.spec.shard.merge(state, self.plan.vocab)

    def sum_over_shards(self, x: Tensor) -> Tensor:
        if self.spec.shard is not None:
            self.spec.shard.sum(x)
        return x

    def products(self, x: Tensor, words: Tensor) -> Tensor:
        """x·wordsᵀ in float32, in the one buffer all tiles share."""
        return mm_rows_(tile_in(self._tile, len(x), len(words)), x, words.t())


def tile_in(buffer: Tensor, n: int, v: int) -> Tensor:
    """[n, v] at the front of a flat buffer, its rows aligned."""
    row = planner.row_cells(v)
    return buffer[: n * row].view(n, row)[:, :v]


def scored_rows(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Rows to compact to; None when all are scored, or when counting would wait for a device."""
    if labels.device.type != "cpu" or ignore_index is None:
        return None
    scored = labels != ignore_index
    return None if bool(scored.all()) else scored.nonzero().squeeze(1)


def check_labels(labels: Tensor, vocab: int, ignore_index: int | None) -> None:
    """On a CPU a label outside the vocabulary raises; elsewhere its row becomes NaN, unread."""
    check_memory(labels=labels)
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


def kept_shapes(
    plan: planner.Plan, spec: HeadSpec, hidden: Tensor, weight: Tensor | Adapted
) -> tuple[int, tuple[int, int]]:
    """Size of `kept` and shape of `anchors` as if all rows were scored, which the plan is of.

    So the shapes are known without reading the labels; memory never written is never committed.
    """
    size, blocks = plan.kept_tokens * plan.row_words, -(-plan.vocab // plan.block_words)
    anchored = spec.anchored(hidden.device, weight)
    if plan.shared_bytes:
        itemsize = spec.compute_dtype.itemsize
        own, other = plan.kept_tokens * itemsize, -(-_bytes(weight) // plan.vocab)  # of one word
        behind = plan.block_words if anchored else 0  # turned in place, a block is still an operand
        size = -(-(max(own, other) * plan.row_words + min(own, other) * behind) // itemsize)
        size += _ALIGNMENT
    rows = hidden.shape[0] if spec.head_grad else 0
    return size, (1, rows) if anchored else (blocks, plan.kept_tokens)


def _bytes(weight: Tensor | Adapted) -> int:
    """Of a d weight that could lie in another buffer."""
    return 0 if isinstance(weight, Adapted) else weight.numel() * weight.dtype.itemsize


def place_of_dweight(kept: Tensor, weight: Tensor) -> Tensor:
    """[V, H] in the dtype of `weight` at the front of `kept`, if `kept_shapes` made it for both.

    While the walk writes words [v0, v1) of it, blocks of later words are untouched: they lie as far
    from the end of `kept`, or farther from its front. In the anchored walk their own block is, too.
    """
    cells = -(-_bytes(weight) // kept.itemsize)
    # `.data`: for autograd `kept` has not changed. Who asks a second time must know (`Loan`).
    front = kept.data[:cells].view(weight.dtype)
    return front[: weight.numel()].view(weight.shape)

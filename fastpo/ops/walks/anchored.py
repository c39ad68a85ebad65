"""The forward without logits: each row's exponentials are taken beside its own target's.

With z_y of the label known first, the product's epilogue takes exp(z_v - z_y) at once, so float32
logits are neither written nor read. log p = -log1p(Σ exp(z_v - z_y)) over the others has no
cancellation. One launch covers the whole vocabulary, so all exponentials of a row are relative to
one number, and what is stored of them is the operand of the products that follow: with E_y := minus
the sum of the others in the label's cell and a scale r per row,

    d log p / d hidden = -r·(E·W)          d loss / d weight = Eᵀ·(-g·r·hidden)

What is left in `state` has the classic meaning, with z_y in place of the running maximum. The other
statistics are sums in the same epilogue, each only where it is asked for.

The product is Triton's, or CUTLASS's where that was built in and serves the operands. Both are
selected by name, `backend="anchored"`, `backend="cutlass"`, or by the table of fastest.py.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import planner
from ..products import mm_
from ..rows import anchored_cutlass as cutlass
from ..rows import backend as R
from ..rows.architecture import is_hopper
from .head import Head

if TYPE_CHECKING:
    from ...kernels.anchored import Exponentials

LOG2_E = 1 / math.log(2)

# A sum above this is computed again. E goes into d weight beside rows that are as much smaller:
# 2**-80 of a gradient is still far from the smallest float32.
_LARGEST_SUM = 2.0**80
# Where squares are summed, too: theirs may reach its square.
_LARGEST_SUM_OF_SQUARES = 2.0**50


def score_block(head: Head, state: Tensor, kept: Tensor, anchors: Tensor, a: int, b: int) -> None:
    from ...kernels.anchored import Exponentials

    plan, e = head.plan, None
    stored = min(plan.kept_tokens, b) - a
    if stored > 0:
        cells = head.kept_cells(kept)
        e = Exponentials(cells, plan.kept_tokens, plan.block_words, a, stored)
    unit = _fold(head, state[:, a:b], a, b, head.words(0, plan.vocab), e)
    if anchors.numel():
        anchors[0, a:b] = unit


def frozen_block(head: Head, state: Tensor, direction: Tensor, a: int, b: int) -> None:
    """d logp / d hidden of rows a to b: the second product, inside the forward."""
    from ...kernels.anchored import Exponentials

    vocab, words = head.plan.vocab, head.words(0, head.plan.vocab)
    width = planner.padded(vocab)
    step = planner.frozen_rows(b - a, vocab, head.gemm.itemsize, head.device)
    buffer = head.empty(min(step, b - a) * width, dtype=head.gemm)
    total = head.empty(min(step, b - a), head.hidden.shape[1], dtype=torch.float32)
    for c in range(a, b, step):
        d = min(c + step, b)
        rows = state[:, c:d]
        unit = _fold(head, rows, c, d, words, Exponentials(buffer, d - c, width, 0, d - c))
        e = buffer[: (d - c) * width].view(d - c, width)[:, :vocab]
        weighted = mm_(total[: d - c], e, words)
        direction[c:d] = weighted.mul_(unit.mul_(-head.spec.logit_map.factor).unsqueeze(1))


def _fold(
    head: Head,
    state: Tensor,  # [STATE, n], written
    a: int,
    b: int,
    words: Tensor,  # [V, H]
    e: Exponentials | None,  # written
) -> Tensor:  # [n] the probability that one unit of `e` is, exp(z - MAX) of rows not stored
    """What all words together say of rows a to b."""
    from ...kernels.anchored_again import WORDS, anchored_again
    from ...kernels.anchored_fold import anchored_fold
    from ...kernels.anchored_target import anchored_target

    spec, n = head.spec, b - a
    origin, base, offset = head.empty(3, n, dtype=torch.float32)
    rows = Operands(unit_columns(head.block(a, b)), unit_columns(words), head.labels[a:b],
                    head.bias, spec.logit_map.factor)  # fmt: skip
    anchored_target(*rows.tensors, state[R.TARGET], origin, base, factor=rows.factor)
    partial = product(head, rows, base, e, spec.stats)
    assert partial is not None
    squares = spec.stats & R.STATS["log_sum_sq_probs"]
    given = {
        "factor": rows.factor,
        "stats": spec.stats,
        "largest": _LARGEST_SUM_OF_SQUARES if squares else _LARGEST_SUM,
    }
    fold = (rows.labels, origin, state, offset, e)
    anchored_fold(partial, None, *fold, vocab=len(words), **given)
    maxima = head.empty(-(-len(words) // WORDS), n, dtype=torch.float32)
    again = head.empty(len(partial), *maxima.shape, dtype=torch.float32)
    others = state[R.OTHERS]
    anchored_again(*rows.tensors, others, maxima, None, None, **given)
    anchored_again(*rows.tensors, others, maxima, again, e, **given)
    anchored_fold(again, maxima, *fold, vocab=len(words), **given)
    own = torch.exp(state[R.TARGET] - state[R.MAX])
    return offset.exp_().div_(state[R.OTHERS] + own)


@dataclass(frozen=True)
class Operands:
    """Of one product: all its rows and words. z = factor·(x·words + bias)."""

    x: Tensor  # [n, H]
    words: Tensor  # [v, H]
    labels: Tensor | None  # [n] int64; None: no word is left out
    bias: Tensor | None  # [v] float32
    factor: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.x, self.words, self.labels, self.bias


def product(
    head: Head,
    rows: Operands,
    base: Tensor,  # [n] float32, exponents to the base of 2 beside which exponentials are taken
    e: Exponentials | None,
    stats: int,
    *,
    sums: bool = True,  # whether any are wanted
) -> Tensor | None:  # [sums, blocks of words, n]
    """Exponentials beside the base, 0 at the label, and their sums block by block."""
    from ...kernels.anchored import SUMS, anchored_fwd

    programs, count = _multiprocessors(head.device), SUMS.value if stats else 1
    if head.spec.backend == "cutlass" and cutlass.serves(rows.x, rows.words, rows.bias):
        return _cutlass_product(rows, base, e, count, programs)
    crowded = rows.bias is not None and stats != 0
    blocks, partial = _gemm_blocks(rows.x, rows.words, crowded), None
    if sums:
        shape = (count, -(-len(rows.words) // blocks.v), len(rows.x))
        partial = head.empty(*shape, dtype=torch.float32)
    given = {"factor": rows.factor, "stats": stats}
    anchored_fwd(*rows.tensors, base, partial, e, blocks, programs, **given)
    return partial


def _cutlass_product(
    rows: Operands, base: Tensor, e: Exponentials | None, sums: int, programs: int
) -> Tensor:
    """A launch for each block of E."""
    vocab, slope, found = len(rows.words), rows.factor * LOG2_E, []
    step = vocab if e is None else e.words
    for v0, columns in _columns(rows.labels, range(0, vocab, step)):
        v1 = min(v0 + step, vocab)
        bias = None if rows.bias is None else rows.bias[v0:v1]
        stored = None
        if e is not None:
            block = e.cells[e.rows * v0 :][: e.rows * step].view(e.rows, step)
            stored = block[e.first : e.first + e.stored, : v1 - v0]
        own = (rows.x, rows.words[v0:v1], columns, bias, base)
        found.append(cutlass.product(*own, stored, slope, sums, programs))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _columns(labels: Tensor | None, firsts: range) -> Iterable[tuple[int, Tensor | None]]:
    """First word of each launch, and columns of the labels from there on, [n] int32."""
    if labels is None:
        return ((v0, None) for v0 in firsts)
    columns = labels.unsqueeze(0)
    if len(firsts) > 1:
        starts = torch.arange(0, firsts.stop, firsts.step, dtype=torch.int64, device=labels.device)
        columns = columns - starts.unsqueeze(1)
    return zip(firsts, columns.clamp(-1, firsts.step).int(), strict=True)


def exponents_of(factor: float) -> float:
    """What turns MAX into an exponent to the base of 2: log2 e, but for the kernels' roundings."""
    slope, factor = (ctypes.c_float(x).value for x in (factor * LOG2_E, factor))
    return slope / factor if factor else LOG2_E


def unit_columns(x: Tensor) -> Tensor:
    """As a kernel reads it: it knows no stride of columns, and no negated view."""
    return (x if x.stride(1) == 1 else x.contiguous()).resolve_neg()


def _gemm_blocks(x: Tensor, words: Tensor, crowded: bool):  # type: ignore[no-untyped-def]  # kernels are untyped
    from ...kernels._blocks import gemm_blocks

    return gemm_blocks(all(map(cutlass.in_blocks, (x, words))) and is_hopper(x.device), crowded)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # what the interpreter walks with, one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count

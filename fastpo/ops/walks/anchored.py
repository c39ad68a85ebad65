"""The forward without logits: each row's exponentials are taken beside its own target's.

With z_y of the label known first, the product's epilogue takes exp(z_v - z_y) at once, so float32
logits are neither written nor read. log p = -log1p(Σ exp(z_v - z_y)) over the others has no
cancellation. What is kept and left in `state` has the classic meaning, with z_y in place of the
running maximum, so the backward is the classic one. The other statistics are sums in the same
epilogue, each only where it is asked for.

The product is Triton's, or CUTLASS's where that was built in and serves the tile. Both are selected
by name, `backend="anchored"`, `backend="cutlass"`, or by the table of _fastest.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rows import anchored_cutlass as cutlass
from ..rows import backend as R
from ..rows.triton import map_scalars
from .head import Head, HeadSpec, addmm_float32

LOG2_E = 1 / math.log(2)

# float16 holds no exponential above 2**16; products of float32 belong to cuBLAS. The interpreter
# knows float32 only, and a CPU has nothing else here.
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def serves(spec: HeadSpec, device: torch.device, biased: bool) -> bool:
    """The one place that chooses between this forward and the classic one."""
    named = spec.backend in ("anchored", "cutlass")
    if spec.shard is not None:
        return False  # the label's word, and so its logit, is another process's
    if biased and spec.logit_map.softcap is not None and spec.stats:
        return False  # the epilogue would spill registers
    return named and spec.compute_dtype == _DTYPES.get(device.type)


def score_block(head: Head, state: Tensor, kept: Tensor, anchors: Tensor, a: int, b: int) -> None:
    block, K = _Block(head, state, a, b), head.plan.kept_tokens
    split = min(max(K, a), b)
    for i, v0, v1 in head.vocab_tiles():
        if split > a:
            stored = head.stored(kept, v0, v1)[a:split]
            block.fold(v0, head.words(v0, v1), stored, anchors[i, a:split])
        else:
            block.fold(v0, head.words(v0, v1))
    block.finish()


def frozen_block(head: Head, state: Tensor, a: int, b: int) -> Tensor:
    """Σ over the others of p_v·dz/dx·W_v [b - a, H]: the second product, inside the forward."""
    block = _Block(head, state, a, b)
    total = torch.zeros(b - a, head.hidden.shape[1], dtype=torch.float32, device=head.device)
    buffer = head.empty(head.tile_cells, dtype=head.gemm)
    for _, v0, v1 in head.vocab_tiles():
        words = head.words(v0, v1)
        e = buffer[: (b - a) * (v1 - v0)].view(b - a, v1 - v0)
        block.fold(v0, words, e, total=total)
        addmm_float32(total, e, words)
    block.finish()
    return total.div_(block.mass_of_all())


class _Block:
    """Rows a to b on their walk over the vocabulary; `state` holds what the words so far add up to.

    origin: [n] what exponentials are taken beside, in units in which z = origin·post.
    """

    def __init__(self, head: Head, state: Tensor, a: int, b: int) -> None:
        from ...kernels.anchored_target import anchored_target

        self.head, self.state = head, state[:, a:b]
        self.x, self.labels = _unit_columns(head.block(a, b)), head.labels[a:b]
        self.origin = head.empty(b - a, dtype=torch.float32)
        self.scalars = map_scalars(head.spec.logit_map)
        # The clamp keeps a lookup inside the weight: the kernel looks at the label itself.
        own = head.weight.index_select(0, self.labels.clamp(0, head.plan.vocab - 1)).to(head.gemm)
        rows = (self.x, own, self.labels, head.bias)
        target = self.state[R.TARGET]
        anchored_target(*rows, target, self.origin, vocab=head.plan.vocab, **self.scalars)

    def fold(
        self,
        first: int,
        words: Tensor,  # [v, H]
        e: Tensor | None = None,  # [stored, v], written: of the first rows
        anchors: Tensor | None = None,  # [stored], written: what `e` is relative to, in nats
        total: Tensor | None = None,  # [n, H], rescaled where the origin moves
    ) -> None:
        """One tile of words. For `total` the soft-cap's slope is multiplied into `e`."""
        from ...kernels.anchored_fold import anchored_fold

        words = _unit_columns(words)
        stats = self.head.spec.stats
        options = {**self.scalars, "stats": stats, "fold_cap": total is not None}
        rows = (self.x, words, self.labels, self.head.bias)
        partial = self._exponentials(rows, e, first, options)
        anchored_fold(*rows, partial, self.origin, self.state, e, anchors, total, first, **options)

    def _exponentials(
        self, rows: tuple, e: Tensor | None, first: int, options: dict[str, Any]
    ) -> Tensor:  # [sums, blocks of words, n]
        """Sums over the others, block by block; `e` is written."""
        from ...kernels.anchored import SUMS, anchored_fwd

        x, words, labels, bias = rows
        programs = _multiprocessors(self.head.device)
        sums = SUMS.value if options["stats"] else 1
        if self.head.spec.backend == "cutlass":
            own = None if bias is None else bias[first : first + len(words)]
            if cutlass.serves(x, words, own, options["softcap"]):
                columns = (labels - first).clamp_(-1, len(words)).int()
                slope = options["post"] * LOG2_E
                own_rows = (x, words, columns, own, self.origin)
                return cutlass.product(*own_rows, e, slope, sums, programs)
        blocks = _gemm_blocks(x, words)
        partial = self.head.empty(sums, -(-len(words) // blocks.v), len(x), dtype=torch.float32)
        anchored_fwd(*rows, self.origin, partial, e, first, blocks, programs, **options)
        return partial

    def finish(self) -> None:
        """The maximum's place in the state: z of the label, or of the origin a row moved to."""
        m, others = self.state[R.MAX], self.state[R.OTHERS]
        torch.mul(self.origin, self.scalars["post"], out=m)
        # A NaN among the others shows in their sum alone, and no label is the best word beside it.
        m.copy_(torch.where(others == others, m, others))

    def mass_of_all(self) -> Tensor:
        """Σ exp(z - origin·post) over all words [n, 1]."""
        own = torch.exp(self.state[R.TARGET] - self.state[R.MAX])
        return (self.state[R.OTHERS] + own).unsqueeze(1)


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _gemm_blocks(x: Tensor, words: Tensor):  # type: ignore[no-untyped-def]  # kernels are untyped
    from ...kernels._blocks import gemm_blocks

    aligned = all(t.data_ptr() % 16 == 0 == t.stride(0) * t.itemsize % 16 for t in (x, words))
    return gemm_blocks(tma=aligned and _is_hopper(x.device))


def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # what the interpreter walks with, one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count

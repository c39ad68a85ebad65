"""`vocab_parallel_topk`: the best words of a head whose words lie in the processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .linear_topk import TopK, TopKOptions, best_words
from .shards.part import alike_in, part_of
from .tiles.tiled import TileSource, tiled


def vocab_parallel_topk(
    hidden: Tensor,
    weight: Tensor | TileSource,
    k: int,
    *,
    first: int | None = None,
    vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    exclude: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    budget: int | None = None,
    backend: str | None = None,
) -> TopK:
    """`linear_topk` of a head [V, H] of which `weight` holds words [first, first + words).

    Every process of `group` calls with the same hidden states, lists and options, and gets the same
    bits: ids are of the whole vocabulary, and so are k, which may be more than the words here, and
    `exclude`. Exchanged are k keys of 8 bytes and 7 numbers a token. In the backward each expects
    the gradient of the same loss; d hidden is summed over the group in float32, d weight and d bias
    are those of its own words. The budget is that of one process.

    hidden: [..., H] float32, bfloat16 or float16.
    weight, bias: [words, H] and [words], or DTensors [V, H] and [V] in shards of words.
    exclude, mask: [...] int64 and [...] bool.
    first, vocab, group: as in `vocab_parallel_logps`.

    Raises what `linear_topk` raises; what `vocab_parallel_logps` raises of shards and
    processes; RuntimeError without an initialised process group.
    """
    alike = alike_in(locals())
    weight = tiled(weight)
    part = part_of(weight, bias, first, vocab, group, alike)
    options = TopKOptions(
        temperature, softcap, logit_scale, budget, backend, part.shard, "vocab_parallel_topk"
    )
    return _best_words(hidden, part.weight, part.bias, k, exclude, mask, options)


# Not for a compiler, as the other heads in shards.
_best_words = torch.compiler.disable(best_words)

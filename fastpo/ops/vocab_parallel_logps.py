"""`vocab_parallel_logps`: a head whose words are spread over the processes of a group.

As tensor parallelism has it, all processes score the same tokens, each on its own words: one
exchange of a few numbers per token makes their softmaxes one. Where tokens are spread as well, as
in fully sharded training, hidden states travel instead of the head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shards.gathered import HeadOptions, score, whole
from .shards.part import alike_in, in_shards, of_dtensor, part_of
from .shards.tokens import Tokens, count
from .stats import TokenStats, handed_out
from .support.resolve import check_support
from .support.score import score_over
from .support.words import Rule, Support
from .tiles.tiled import TileSource, tiled
from .walks.checks import check_flag, check_kind, check_tensors, per_row
from .walks.derivatives import check_plain


def vocab_parallel_logps(
    hidden: Tensor,
    weight: Tensor | TileSource,
    labels: Tensor,
    *,
    first: int | None = None,
    vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    own_tokens: bool = False,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    outputs: tuple[str, ...] = ("logps",),
    support: Tensor | Support | None = None,
    outside: str = "error",
    budget: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`linear_logps` of a head [V, H] of which `weight` holds words [first, first + words).

    Every process of `group` calls with the same hidden states, labels and options, and gets the
    same bits: one all-gather of 7 numbers a token. In the backward each expects the gradient of the
    same loss; d hidden is summed over the group in float32, d weight and d bias are those of its
    own words. The budget is that of one process.

    hidden: [..., H] float32, bfloat16 or float16.
    weight, bias: [words, H] and [words], or DTensors [V, H] and [V] in shards of words.
    labels: [...] int64, in [0, V) or ignore_index; labels[i] is scored by hidden[i], unshifted.
    temperature: a number, or one per token, [...].
    first, vocab: the first word here and V; left out for a DTensor, which tells, and whose gradient
        is one again.
    group: None: all processes; of a DTensor, its mesh.
    own_tokens: hidden states and labels differ, in number, too. They are gathered, so every process
        holds all tokens' [N, H]; results are those of its own tokens. Each expects the gradient of
        its own loss, and d weight is the mean over the processes, as data parallelism has it.
        Counts are exchanged first, which waits for the device. All losses are of the same outputs:
        the backward of each is a collective.

    support, outside: as in `linear_logps`, word ids of the whole vocabulary, the same on every
        process, which multiplies those of its own words; not with own_tokens.

    "anchored" and "cutlass" run as "triton" here. Raises what `linear_logps` raises; on a CPU
    ValueError, in all processes, where shards do not make up [0, V) and where what has to be the
    same is not: elsewhere the former makes log-probabilities NaN, and the latter is not noticed;
    RuntimeError without an initialised process group.
    """
    alike = _alike(locals())
    weight = tiled(weight)
    check_plain("vocab_parallel_logps", (hidden, weight, labels, bias))
    check_flag("own_tokens", own_tokens)
    part = part_of(weight, bias, first, vocab, group, alike)
    check_kind(labels=labels)
    number, inverse = per_row(temperature, labels, ignore_index)
    options = HeadOptions(
        number,
        softcap,
        logit_scale,
        outputs,
        budget,
        backend,
        ignore_index=ignore_index,
        shard=part.shard,
        name="vocab_parallel_logps",
    )
    check_tensors(hidden, part.weight, labels, part.bias, part=True)
    check_support(support, outside, labels)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if support is not None:
        if own_tokens or isinstance(support, Rule):
            got = "own_tokens=True" if own_tokens else repr(support)
            raise ValueError(f"support: expected word ids of tokens that all have, got {got}")
        if isinstance(support, Tensor):
            support = support.reshape(labels.numel(), support.shape[-1])
        operands = rows, part.weight, part.bias, targets, options
        stats = score_over(support, outside, *operands, inverse=inverse)
    elif not own_tokens:
        stats = score(rows, part.weight, part.bias, targets, options, inverse=inverse)
    else:
        tokens = count(len(rows), [rows], name=options.name, group=part.shard.group)
        stats = score_own(tokens, rows, part.weight, part.bias, targets, options, inverse)
    return handed_out({name: getattr(stats, name) for name in outputs}, labels.shape)


def _alike(given: dict[str, Any]) -> dict[str, Any]:
    """`alike_in`, the words of a support, and how d hidden is computed."""
    alike, support, hidden = alike_in(given), given["support"], given["hidden"]
    if isinstance(support, Support):
        alike["support"] = support.ids, support.counts
    grad, own = torch.is_grad_enabled(), given["own_tokens"] is True
    asks = grad and isinstance(hidden, Tensor) and hidden.requires_grad
    if asks or own:  # with own tokens one process may ask for all
        # Where the head is frozen the forward sums their gradient, else the backward.
        head = (getattr(given[name], "requires_grad", False) for name in ("weight", "bias"))
        alike["weight"] = "trained" if grad and any(head) else "frozen"
    return alike


def score_own(
    tokens: Tokens,
    hidden: Tensor,  # [n, H] of this process
    weight: Tensor,  # [words, H]
    bias: Tensor | None,
    labels: Tensor,  # [n]
    options: HeadOptions,
    inverse: Tensor | None = None,  # [n]
) -> TokenStats:
    """`score` of the tokens of all processes, of which each gets its own."""
    everything = tokens.gather_hidden(hidden), weight, bias, tokens.gather(labels)
    inverse = None if inverse is None else tokens.gather(inverse)
    stats = score(*everything, options, inverse=inverse)
    return TokenStats(*(None if x is None else tokens.own(x) for x in stats))


def score_sharded(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H], may be a DTensor
    bias: Tensor | None,
    labels: Tensor,  # [n]
    options: HeadOptions,
    adapter: tuple[Tensor, Tensor] | None = None,
    *,
    own_tokens: bool = True,
) -> TokenStats:
    """`score` of a weight that may be in shards, of FSDP2 or, not `own_tokens`, tensor-parallel."""
    if in_shards(weight) and adapter is None:
        part = of_dtensor(weight, bias)
        shared = replace(options, shard=part.shard)
        if not own_tokens:
            return score(hidden, part.weight, part.bias, labels, shared)
        tokens = count(len(hidden), [hidden], name=options.name, group=part.shard.group)
        # Hidden states are gathered in 16 bits, their gradients summed in 32: 10·H bytes a token.
        # The head is gathered and its gradient scattered, both in 16 bits, 4·H bytes a word.
        if 5 * sum(tokens.counts) <= 2 * part.shard.vocab:
            return score_own(tokens, hidden, part.weight, part.bias, labels, shared)
    bias = None if bias is None else whole(bias)
    return score(hidden, whole(weight), bias, labels, options, adapter=adapter)

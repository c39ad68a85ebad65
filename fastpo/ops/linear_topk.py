"""`linear_topk`: the k most likely words of a language-model head, without its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .operators import Call, Operators
from .rows import backend as R
from .rows import registry
from .tiles.tiled import TileSource, outside_graphs, tiled
from .walks import topk as walk
from .walks.checks import (
    check_integer,
    check_map,
    check_options,
    check_tensors,
    check_whole,
    compute_dtype,
    given,
    shape_of,
)
from .walks.derivatives import check_plain, first_derivatives
from .walks.head import Forward, HeadSpec
from .walks.saving import stays

if TYPE_CHECKING:
    from .walks.vocab_shard import VocabShard

_LEFT_OUT = -100


class TokenSample(NamedTuple):
    """One word per token.  values: [...] float32 log-probability, nats.  ids: [...] int64."""

    values: Tensor
    ids: Tensor


class TopK(NamedTuple):
    """The k most likely words of every token, the most likely first; 0 where masked out.

    values: [..., k] float32, log-probabilities over the whole vocabulary, nats.
    ids: [..., k] int64.  lse: [...] float32, log Σ exp z over the whole vocabulary, nats.
    Gradient flows from values and lse.
    """

    values: Tensor
    ids: Tensor
    lse: Tensor

    def sample(
        self, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> TokenSample:
        """`sample_topk` of this list."""
        return sample_topk(self, temperature=temperature, generator=generator)


def sample_topk(
    topk: TopK, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> TokenSample:
    """One word of each list, drawn with probability ∝ exp(value / temperature); [...] each.

    values are those of the list, over the whole vocabulary and before `temperature`, with their
    gradient. generator: of the device of `topk`; None: PyTorch's default one.
    Raises ValueError for what is no TopK and a temperature that is not a finite number > 0.
    """
    if not isinstance(topk, TopK):
        raise ValueError(f"topk: expected a fastpo.TopK, got {type(topk).__name__}")
    check_map(temperature, None, 1.0)
    scores = topk.values.detach() / float(temperature)
    # The first of k exponential clocks to ring. torch.multinomial would stop a GPU at a row of
    # NaN; here such a row gives NaN.
    clocks = torch.empty_like(scores).exponential_(generator=generator)
    drawn = (scores - clocks.log()).argmax(-1, keepdim=True)
    return TokenSample(*(x.gather(-1, drawn).squeeze(-1) for x in (topk.values, topk.ids)))


def linear_topk(
    hidden: Tensor,
    weight: Tensor | TileSource,
    k: int,
    *,
    exclude: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    budget: int | None = None,
    backend: str | None = None,
) -> TopK:
    """The k largest of log softmax(z), with z as in `linear_logps`, and the words they belong to.

    Of words with the same z the lowest comes first, on every device. Memory is that of
    `linear_logps` and [..., k]; the logits exist only as tiles.

    hidden: [..., H] float32, bfloat16 or float16.
    weight, bias: [V, H] and [V], as in `linear_logps`.
    exclude: [...] int64, a word per token that is left out of its list, though not of the softmax;
        negative: none. The alternatives of arXiv:2312.16682 are drawn from such a list.
    mask: [...] bool, False leaves a token out: zeros, no gradient. None: all are scored.
    budget: bytes of probabilities that may be kept for the backward; tokens above it are
        recomputed, one product more. None: for a trainable head as in `linear_logps`, 0 for a
        frozen one.
    backend: "triton", "cuda", "cpu" or "torch"; None: the best that is there.

    Raises ValueError for shapes, dtypes, devices and options, for k outside [1, V] (V - 1 with
    `exclude`) and, on a CPU, for an excluded word that is not there. RuntimeError when a named
    backend is missing. A NaN or infinite hidden state gives NaN in its row.
    """
    options = TopKOptions(temperature, softcap, logit_scale, budget, backend)
    return best_words(hidden, tiled(weight), bias, k, exclude, mask, options)


@dataclass(frozen=True)
class TopKOptions:
    """What `linear_topk` takes as keywords.  name: who errors are of."""

    temperature: float
    softcap: float | None
    logit_scale: float
    budget: int | None
    backend: str | None
    shard: VocabShard | None = None
    name: str = "linear_topk"

    def call(self, hidden: Tensor, head_grad: bool, ignore_index: int | None, k: int) -> Call:
        plain = (
            k,
            float(self.temperature),
            None if self.softcap is None else float(self.softcap),
            float(self.logit_scale),
            ignore_index,
            compute_dtype(hidden),
            registry.choose(self.backend, hidden.device),
            head_grad or (torch.is_grad_enabled() and hidden.requires_grad),
            0 if self.budget is None and not head_grad else self.budget,
        )
        return Call(self.name, plain, self.shard)


def best_words(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    k: int,
    exclude: Tensor | None,  # [...]
    mask: Tensor | None,  # [...]
    options: TopKOptions,
) -> TopK:
    """`linear_topk`; of the options' shard the weight holds the words."""
    check_plain(options.name, (hidden, weight, bias, exclude, mask))
    check_whole(hidden=hidden, **given(exclude=exclude, mask=mask))
    tokens, shard = hidden.shape[:-1], options.shard
    labels = torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
    check_tensors(hidden, weight, labels, bias, part=shard is not None)
    logit_map = options.temperature, options.softcap, options.logit_scale
    check_options(*logit_map, ("logps",), options.budget)
    vocab = len(weight) if shard is None else shard.vocab
    _check_lists(labels, vocab, k, exclude, mask)
    if exclude is not None:
        # What is left out may hold anything.
        exclude = (exclude if mask is None else torch.where(mask, exclude, -1)).reshape(-1)
    head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    head_grad = torch.is_grad_enabled() and head_grad
    labels = labels.view(-1) if mask is None else torch.where(mask.reshape(-1), 0, _LEFT_OUT)
    call = options.call(hidden, head_grad, None if mask is None else _LEFT_OUT, k)
    with stays():
        run = outside_graphs(_LinearTopK.apply, weight)
        rows = hidden.reshape(-1, hidden.shape[-1])
        values, ids, lse = run(labels, exclude, call, rows, weight, bias)
    if values.requires_grad:  # the caller may write into what the backward reads
        ids, lse = ids.clone(), lse.clone()
    return TopK(values.view(*tokens, k), ids.view(*tokens, k), lse.view(tokens))


# What `TopKOptions.call` gives.
_SCHEMA = (
    "int k, float temperature, float? softcap, float logit_scale, int? ignore_index, "
    "ScalarType dtype, str backend, bool grad, int? budget"
)


def _spec(
    _: Any,
    k: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    dtype: torch.dtype,
    backend: str,
    grad: bool,
    budget: int | None,
    *,
    shard: VocabShard | None,
) -> walk.TopKSpec:
    head = HeadSpec(
        logit_map=R.LogitMap(temperature, softcap, logit_scale),
        ignore_index=ignore_index,
        outputs=("logps",),
        compute_dtype=dtype,
        backend=backend,
        hidden_grad=grad,
        head_grad=grad,  # what a frozen head keeps is the same
        budget=budget,
        shard=shard,
    )
    return walk.TopKSpec(k, head)


def _forward(rows: Any, tensors: Any, spec: walk.TopKSpec) -> list[Tensor]:
    (hidden, weight, bias), (labels, exclude) = tensors, rows
    found = walk.forward(hidden, weight, bias, labels, exclude, spec)
    return [found.values, found.z, found.ids, found.top, *found.stats]


def _fake_forward(_: Any, tensors: Any, spec: walk.TopKSpec) -> list[Tensor]:
    hidden, weight, _ = tensors
    found = walk.fake_forward(hidden, weight, spec)
    return [torch.empty_like(found.z), found.z, found.ids, found.top, *found.stats]


def _backward(
    grads: Any, rows: Any, tensors: Any, saved: Any, needs: Any, spec: walk.TopKSpec
) -> tuple[Tensor | None, ...]:
    (hidden, weight, bias), (z, ids, top, *stats) = tensors, saved
    found = walk.Found(z, ids, top, Forward(*stats))
    return walk.backward(grads, hidden, weight, bias, rows[0], found, spec, needs)


_OPERATORS = Operators(
    "linear_topk",
    _SCHEMA,
    spec=_spec,
    forward=_forward,
    backward=_backward,
    fake=_fake_forward,
)


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, labels: Tensor, exclude: Tensor | None, call: Call, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, *saved = _OPERATORS.forward(call, (labels, exclude), tensors)
        _, ids, _, *stats = saved
        ctx.call = call
        ctx.save_for_backward(labels, exclude, *tensors, *saved)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return values, ids, Forward(*stats).lse

    @staticmethod
    def backward(ctx: Any, values: Tensor | None, _: Any, lse: Tensor | None) -> tuple:
        check_plain(ctx.call.name, (values, lse))
        kept = ctx.saved_tensors
        rows, tensors, saved = kept[:2], kept[2:5], kept[5:]
        needs, grads = ctx.needs_input_grad[3:], (values, lse)
        found = _OPERATORS.backward(ctx.call, grads, rows, tensors, saved, needs)
        return *(None,) * 3, *first_derivatives(ctx.call.name, found, (*grads, *tensors))


def _check_lists(
    labels: Tensor, vocab: int, k: int, exclude: Tensor | None, mask: Tensor | None
) -> None:
    most = vocab if exclude is None else vocab - 1  # no difference of a bool: torch 2.11
    check_integer("k", k, f"an integer in [1, {most}]", lambda x: 1 <= x <= most)
    lists = {"exclude": (exclude, torch.int64), "mask": (mask, torch.bool)}
    for name, (tensor, dtype) in lists.items():
        if tensor is None:
            continue
        if tensor.shape != labels.shape:
            raise ValueError(f"{name}: expected shape {shape_of(labels)}, got {shape_of(tensor)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tensor.device != labels.device:
            raise ValueError(f"{name}: expected device {labels.device}, got {tensor.device}")

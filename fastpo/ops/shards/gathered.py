"""The head where its weight may be gone between forward and backward, or lie in shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from ..rows import backend as R
from ..rows import fastest, registry
from ..stats import TokenStats
from ..walks import forward as driver
from ..walks.checks import OUTPUTS, check_flag, check_options, check_tensors, compute_dtype
from ..walks.derivatives import check_plain, first_derivatives
from ..walks.head import beside
from ..walks.lending import Loan
from ..walks.mask import WordMask
from ..walks.saving import adds_to, stays
from ..walks.vocab_shard import VocabShard

# Held while d weight is added to a gradient: of two threads one would lose its sums.
_ADDING = Lock()

Gather = Callable[..., AbstractContextManager[Any]]


@dataclass(frozen=True)
class HeadOptions:
    """What `linear_logps` takes as keywords; logps are always computed.

    accumulate: from the second backward on d weight is added to `weight.grad` as it is computed,
    and autograd gets none: no second [V, H] while gradients are accumulated, and one rounding less.
    Nobody but the optimiser may wait for that gradient, not DDP. A weight with hooks of its own is
    left to autograd: they see, and may change, all of its gradient.
    name: who errors are of.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ("logps",)
    budget: int | None = None
    backend: str | None = None
    accumulate: bool = False
    ignore_index: int | None = None  # every row is scored
    shard: VocabShard | None = None
    name: str = "fastpo"

    def __post_init__(self) -> None:
        check_flag("accumulate", self.accumulate)
        registry.check(self.backend)
        check_options(
            self.temperature,
            self.softcap,
            self.logit_scale,
            self.outputs,
            self.budget,
            self.ignore_index,
        )

    def spec(self, hidden: Tensor, grads: tuple[bool, bool], weight: Tensor) -> driver.HeadSpec:
        dtype = compute_dtype(hidden)
        return driver.HeadSpec(
            R.LogitMap.of(self.temperature, self.softcap, self.logit_scale),
            ignore_index=self.ignore_index,
            outputs=tuple(name for name in OUTPUTS if name in ("logps", *self.outputs)),
            compute_dtype=dtype,
            backend=fastest.choose(self.backend, hidden.device, dtype, weight.shape[1]),
            hidden_grad=grads[0],
            head_grad=grads[1],
            budget=self.budget,
            # Where d weight is added to a gradient that is there, it needs no place.
            lends=weight.requires_grad and not self.accumulate,
            shard=self.shard,
            anchors=True,
        )


def gathered(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """The whole parameters where DeepSpeed ZeRO-3 has sharded them: outside they are empty."""
    sharded = {
        id(p): p
        for p in parameters
        if p is not None and hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"
    }
    if not sharded:
        return nullcontext()
    deepspeed = import_module("deepspeed")
    return deepspeed.zero.GatheredParameters(list(sharded.values()))


def whole(parameter: Tensor) -> Tensor:
    """A parameter of which FSDP2 shows this process a shard, as a tensor that can be read."""
    if not isinstance(parameter, DTensor):
        return parameter
    # FSDP2 averages gradients over the processes. By default each would keep, of the gradient of
    # its own rows alone, the part that is its shard.
    average = [Partial("avg")] * parameter.device_mesh.ndim
    return parameter.full_tensor(grad_placements=average)


# Nothing here is for a compiler: loops over tiles whose number depends on how many rows count.
@torch.compiler.disable
def score(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64 in [0, V) or options.ignore_index
    options: HeadOptions,
    gather: Gather = gathered,
    adapter: tuple[Tensor, Tensor] | None = None,  # [N, r] and [V, r]
    inverse: Tensor | None = None,  # [N] float64, 1/temperature of each token
    mask: WordMask | None = None,  # of N rows
) -> TokenStats:
    """`linear_logps`; `gather(weight, bias)` makes both readable.

    adapter: down and up, adds down·upᵀ to the products. The backward enters `gather` again, which
    the custom operators of `linear_logps` cannot.
    """
    check_plain(options.name, (hidden, weight, bias, labels, *(adapter or ())))
    # Inside an autograd.Function grad mode is always off, so it has to be read out here.
    grad = torch.is_grad_enabled()
    trained = (weight, bias, None if adapter is None else adapter[1])
    head_grad = any(x is not None and x.requires_grad for x in trained)
    with gather(weight, bias):
        check_tensors(hidden, weight, labels, bias, part=options.shard is not None)
        up = None
        if adapter is not None:
            down, up = adapter
            hidden = beside(hidden, down.to(hidden.dtype))
        spec = options.spec(hidden, (grad and hidden.requires_grad, grad and head_grad), weight)
        spec = replace(spec, logit_map=replace(spec.logit_map, inverse=inverse), mask=mask)
        if mask is not None and options.softcap is not None:
            # Kept, not turned into d hidden at once: masked rows are without the soft-cap's slope.
            spec = replace(spec, head_grad=spec.head_grad or spec.hidden_grad)
        call = _Call(options.name, spec, gather, options.accumulate)
        with stays():
            results = _GatheredHead.apply(hidden, weight, bias, up, labels, call)
    return TokenStats(**dict(zip(OUTPUTS, results, strict=True)))


@dataclass(frozen=True)
class _Call:
    """What is not a tensor in one call."""

    name: str
    spec: driver.HeadSpec
    gather: Gather
    accumulate: bool

    def into(self, weight: Tensor, head: Tensor | driver.Adapted) -> Tensor | None:
        """Where d weight may be added at once: the gradient of a plain leaf that has one."""
        if not self.accumulate or head is not weight or not weight.is_leaf:
            return None
        if torch.is_grad_enabled():
            return None  # whoever differentiates it shall be told, see `first_derivatives`
        if weight._backward_hooks:
            return None
        grad = weight.grad
        plain = type(grad) is Tensor and grad.layout == torch.strided
        if not plain or grad is None or grad.shape != weight.shape:
            return None
        return grad if adds_to(weight) else None

    def head(self, weight: Tensor, up: Tensor | None) -> Tensor | driver.Adapted:
        if up is None:
            return weight
        first = 0 if weight.requires_grad else weight.shape[1]
        return driver.Adapted(weight, up, slice(first, None))


class _GatheredHead(torch.autograd.Function):
    """The driver's forward and backward, the latter inside `gather(weight, bias)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H], or [N, H + r] with an adapter
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        up: Tensor | None,  # [V, r]
        labels: Tensor,  # [N]
        call: _Call,
    ) -> tuple[Tensor | None, ...]:
        # Entropy is mostly logged only: a gradient of zeros would recompute all logits for it.
        ctx.set_materialize_grads(False)
        saved = driver.forward(hidden, call.head(weight, up), bias, labels, call.spec)
        ctx.save_for_backward(hidden, weight, bias, up, labels, *saved)
        ctx.call, ctx.loan = call, Loan()
        stats, outputs = saved._asdict(), call.spec.outputs
        results = tuple(stats[name] if name in outputs else None for name in OUTPUTS)
        constant = ("log_sum_sq_probs", "mean_logits", "is_top1")
        ctx.mark_non_differentiable(*(stats[name] for name in constant if name in outputs))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_plain(ctx.call.name, grads)
        by_name = dict(zip(OUTPUTS, grads, strict=True))
        hidden, weight, bias, up, labels, *saved = ctx.saved_tensors
        need_hidden, need_weight, need_bias, need_up, *_ = ctx.needs_input_grad
        adding = _ADDING if ctx.call.accumulate else nullcontext()
        with ctx.call.gather(weight, bias), adding:
            head = ctx.call.head(weight, up)
            dhidden, dhead, dbias = driver.backward(
                by_name,
                hidden,
                head,
                bias,
                labels,
                driver.Forward(*saved),
                ctx.call.spec,
                (need_hidden, need_weight or need_up, need_bias),
                ctx.call.into(weight, head) if need_weight else None,
                ctx.loan,
            )
        dup = None
        if up is not None and dhead is not None:
            dhead, dup = dhead.tensor_split([dhead.shape[1] - up.shape[1]], 1)
            dup = dup.to(up.dtype)
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        found = dhidden, dhead if need_weight else None, dbias, dup
        sources = (*grads, hidden, weight, bias, up)
        return *first_derivatives(ctx.call.name, found, sources), None, None

"""The head as the integrations call it: its weights may be gone between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..ops import _driver
from ..ops import _rows as R
from ..ops.linear_logps import (
    OUTPUTS,
    TokenStats,
    _check_options,
    _check_tensors,
    compute_dtype,
)

Gather = Callable[..., AbstractContextManager[Any]]


@dataclass(frozen=True)
class HeadOptions:
    """What `linear_logps` takes as keywords; every row is scored, and logps always computed."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ("logps",)
    budget: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        _check_options(self.temperature, self.softcap, self.logit_scale, self.outputs, self.budget)

    def spec(self, hidden: Tensor, grads: tuple[bool, bool]) -> _driver.HeadSpec:
        return _driver.HeadSpec(
            R.LogitMap(self.temperature, self.softcap, self.logit_scale),
            ignore_index=None,
            outputs=tuple(name for name in OUTPUTS if name in ("logps", *self.outputs)),
            compute_dtype=compute_dtype(hidden),
            backend=R.choose(self.backend, hidden.device),
            hidden_grad=grads[0],
            head_grad=grads[1],
            budget=self.budget,
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


# Nothing here is for a compiler: loops over tiles whose number depends on how many rows count.
@torch.compiler.disable
def score(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64 in [0, V)
    options: HeadOptions,
    gather: Gather = gathered,
) -> TokenStats:
    """`linear_logps` of rows that are all scored; `gather(weight, bias)` makes both readable.

    The backward enters `gather` again, which the custom operators of `linear_logps` cannot.
    """
    # Inside an autograd.Function grad mode is always off, so it has to be read out here.
    grad = torch.is_grad_enabled()
    head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    spec = options.spec(hidden, (grad and hidden.requires_grad, grad and head_grad))
    with gather(weight, bias):
        _check_tensors(hidden, weight, labels, bias)
        results = _GatheredHead.apply(hidden, weight, bias, labels, spec, gather)
    return TokenStats(**dict(zip(OUTPUTS, results, strict=True)))


class _GatheredHead(torch.autograd.Function):
    """The driver's forward and backward, the latter inside `gather(weight, bias)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [N]
        spec: _driver.HeadSpec,
        gather: Gather,
    ) -> tuple[Tensor | None, ...]:
        # Entropy is mostly logged only: a gradient of zeros would recompute all logits for it.
        ctx.set_materialize_grads(False)
        saved = _driver.forward(hidden, weight, bias, labels, spec)
        ctx.save_for_backward(hidden, weight, bias, labels, *saved)
        ctx.spec, ctx.gather = spec, gather
        stats = saved._asdict()
        results = tuple(stats[name] if name in spec.outputs else None for name in OUTPUTS)
        constant = ("log_sum_sq_probs", "mean_logits", "is_top1")
        ctx.mark_non_differentiable(*(stats[name] for name in constant if name in spec.outputs))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_name = dict(zip(OUTPUTS, grads, strict=True))
        hidden, weight, bias, labels, *saved = ctx.saved_tensors
        with ctx.gather(weight, bias):
            dhidden, dweight, dbias = _driver.backward(
                by_name,
                hidden,
                weight,
                bias,
                labels,
                _driver.Forward(*saved),
                ctx.spec,
                ctx.needs_input_grad[:3],
            )
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dhidden, dweight, dbias, None, None, None

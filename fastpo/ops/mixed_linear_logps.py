"""`mixed_linear_logps`: log-probabilities under a mixture of heads' logits, renormalised."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from .rows import backend as R
from .rows import registry
from .stats import TokenStats
from .tiles.tiled import TileSource, tiled
from .walks import mixture
from .walks.checks import (
    OUTPUTS,
    check_number,
    check_options,
    check_tensors,
    compute_dtype,
    shape_of,
)
from .walks.derivatives import check_plain, first_derivatives
from .walks.head import Forward, HeadSpec
from .walks.saving import stays


def mixed_linear_logps(
    hiddens: Sequence[Tensor],  # M of [..., H_i] float32 / bfloat16 / float16
    weights: Sequence[Tensor | TileSource],  # M of [V, H_i]
    coefficients: Sequence[float] | Tensor,  # M, or [M], or per token [..., M]
    labels: Tensor,  # [...] int64 in [0, V) or ignore_index
    *,
    biases: Sequence[Tensor | None] | None = None,  # M of [V]
    temperature: float = 1.0,
    softcaps: Sequence[float | None] | None = None,  # M
    logit_scales: Sequence[float] | None = None,  # M
    ignore_index: int | None = -100,
    outputs: tuple[str, ...] = ("logps",),
    backend: str | None = None,
) -> TokenStats:
    """log softmax(Σ_i m_i·z_i / temperature)[label], z_i = softcap_i(scale_i·(h_i·W_iᵀ + b_i)).

    The geometric mixture of policies, Π_i p_i^m_i renormalised: m, 1 - m for a policy and its
    reference in Nash-MD (arXiv:2312.00886) and SPA (arXiv:2406.04412). All statistics of
    `linear_logps` are those of the mixture. One mixed tile and one tile of a head's logits are
    alive at a time; nothing is kept for the backward, which multiplies M times more than once.

    Gradient flows from logps, entropy and lse to every hidden, weight and bias that requires it,
    not to the coefficients. A word that one head excludes by a logit of -inf is excluded from the
    mixture where that head's coefficient is > 0, and gives NaN where it is 0.

    Raises ValueError for shapes, dtypes, devices, options, coefficients that require gradient
    and, on a CPU, labels that cannot be; on a GPU such a label makes its row NaN. RuntimeError
    when a named backend is missing. A NaN or infinite hidden state gives NaN in its row.
    """
    heads = _count("hiddens", hiddens)
    _count("weights", weights)
    words = [tiled(weight) for weight in weights]
    biases = _one_per_head("biases", biases, heads, None)
    softcaps = _one_per_head("softcaps", softcaps, heads, None)
    logit_scales = _one_per_head("logit_scales", logit_scales, heads, 1.0)
    weighing = coefficients if isinstance(coefficients, Tensor) else None
    check_plain("mixed_linear_logps", (*hiddens, *words, *biases, weighing, labels))
    _check_heads(hiddens, words, biases, labels)
    for cap, scale in zip(softcaps, logit_scales, strict=True):
        check_options(temperature, cap, scale, outputs, None, ignore_index)
    spec = mixture.MixtureSpec(
        head=HeadSpec(
            logit_map=R.LogitMap(float(temperature)),
            ignore_index=ignore_index,
            outputs=tuple(name for name in OUTPUTS if name in outputs or name == "logps"),
            compute_dtype=torch.float32,
            backend=registry.choose(backend, labels.device),
            hidden_grad=False,
            head_grad=False,
            budget=0,
        ),
        maps=tuple(
            R.LogitMap(1.0, None if cap is None else float(cap), float(scale))
            for cap, scale in zip(softcaps, logit_scales, strict=True)
        ),
        dtypes=tuple(map(compute_dtype, hiddens)),
    )
    own = _weights_of_heads(coefficients, heads, labels)
    rows = (hidden.reshape(-1, hidden.shape[-1]) for hidden in hiddens)
    with stays():
        results = _MixedLinearLogps.apply(labels.reshape(-1), own, spec, *rows, *words, *biases)
    fields = dict(zip(OUTPUTS, results, strict=True))
    return TokenStats(**{name: fields[name].view(labels.shape) for name in outputs})


class _MixedLinearLogps(torch.autograd.Function):
    """Of labels, coefficients, spec, then M hidden states, M weights and M biases."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        coefficients: Tensor,
        spec: mixture.MixtureSpec,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        stats = mixture.forward(_operands(tensors), coefficients, labels, spec)
        ctx.spec = spec
        ctx.save_for_backward(labels, coefficients, *tensors, *stats)
        ctx.mark_non_differentiable(stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1)
        # Statistics are often only logged: their absent gradients shall not arrive as zeros.
        ctx.set_materialize_grads(False)
        return tuple(getattr(stats, name) for name in OUTPUTS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_plain("mixed_linear_logps", grads)
        labels, coefficients, *rest = ctx.saved_tensors
        count = 3 * len(ctx.spec.maps)
        operands, stats = _operands(rest[:count]), Forward(*rest[count:])
        needs = _per_head(ctx.needs_input_grad[3:])
        by_name = dict(zip(OUTPUTS, grads, strict=True))
        given = {name: by_name[name] for name in ("logps", "entropy", "lse")}
        found = mixture.backward(given, operands, coefficients, labels, stats, ctx.spec, needs)
        dbiases = (
            None if x.bias is None or g.bias is None else g.bias.to(x.bias.dtype)
            for x, g in zip(operands, found, strict=True)
        )
        leaves = (*(g.hidden for g in found), *(g.weight for g in found), *dbiases)
        sources = (*grads, *rest[:count])
        return None, None, None, *first_derivatives("mixed_linear_logps", leaves, sources)


def _per_head(flat: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """(hidden, weight, bias) of each head, from all hiddens, all weights, all biases."""
    heads = len(flat) // 3
    return list(zip(flat[:heads], flat[heads : 2 * heads], flat[2 * heads :], strict=True))


def _operands(tensors: Sequence[Tensor | None]) -> list[mixture.Operands]:
    return [mixture.Operands(*head) for head in _per_head(tensors)]


def _one_per_head(name: str, given: Sequence[Any] | None, heads: int, default: Any) -> list[Any]:
    if given is None:
        return [default] * heads
    if not isinstance(given, (tuple, list)) or len(given) != heads:
        raise ValueError(f"{name}: expected {heads} entries, one per head, got {given!r}")
    return list(given)


def _count(name: str, given: Any) -> int:
    if isinstance(given, Tensor) or not isinstance(given, Sized):
        raise ValueError(f"{name}: expected a sequence, one entry per head, got {type(given)}")
    return len(given)


def _check_heads(
    hiddens: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Any], labels: Tensor
) -> None:
    if not hiddens:
        raise ValueError("hiddens: expected at least one head, got none")
    if len(weights) != len(hiddens):
        raise ValueError(f"weights: expected {len(hiddens)} entries, got {len(weights)}")
    for i, (hidden, weight, bias) in enumerate(zip(hiddens, weights, biases, strict=True)):
        try:
            check_tensors(hidden, weight, labels, bias)
        except ValueError as error:
            raise ValueError(f"head {i}: {error}") from None
        if len(weight) != len(weights[0]):
            raise ValueError(
                f"head {i}: weight: expected {len(weights[0])} words as in head 0, "
                f"got {len(weight)}"
            )


def _weights_of_heads(
    coefficients: Sequence[float] | Tensor, heads: int, labels: Tensor
) -> Tensor:  # [M] or [N, M] float32
    if not isinstance(coefficients, Tensor):
        expected = f"{heads} finite numbers"
        if _count("coefficients", coefficients) != heads:
            raise ValueError(f"coefficients: expected {expected}, got {tuple(coefficients)}")
        for value in coefficients:
            check_number("coefficients", value, expected)
        return R.filled_rows(tuple(map(float, coefficients)), 1, labels.device).squeeze(1)
    allowed = ((heads,), (*labels.shape, heads))
    if tuple(coefficients.shape) not in allowed:
        raise ValueError(
            f"coefficients: expected shape {allowed[0]} or {allowed[1]}, "
            f"got {shape_of(coefficients)}"
        )
    if not coefficients.dtype.is_floating_point:
        raise ValueError(f"coefficients: expected a floating dtype, got {coefficients.dtype}")
    if coefficients.device != labels.device:
        raise ValueError(
            f"coefficients: expected device {labels.device}, got {coefficients.device}"
        )
    if coefficients.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "coefficients: expected a tensor without gradient, got requires_grad=True; detach it"
        )
    return coefficients.detach().float().reshape((-1, heads) if coefficients.dim() > 1 else heads)

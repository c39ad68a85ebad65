"""`linear_divergence`: how far a student's next-token distribution is from a teacher's.

Both distributions come from hidden states and heads; the logits [N, V] of either exist only as
tiles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import backend as R
from .rows import registry
from .rows.pair.backend import KINDS, Rule
from .tiles.tiled import TileSource, tiled
from .walks import divergence as walk
from .walks.checks import (
    check_flag,
    check_map,
    check_names,
    check_number,
    check_options,
    check_tensors,
    check_whole,
    compute_dtype,
    given,
    per_row,
    shape_of,
)
from .walks.derivatives import check_plain, first_derivatives
from .walks.divergence import DivergenceSpec
from .walks.head import HeadSpec
from .walks.mixture import Operands
from .walks.saving import stays

LEFT_OUT = -100
_OUTPUTS = ("divergence", "entropy")


class DivergenceStats(NamedTuple):
    """Per token, float32, nats, 0 where masked out; None where not requested.

    divergence: with gradient.  entropy: of the student, -Σ p log p, without gradient.
    """

    divergence: Tensor | None = None
    entropy: Tensor | None = None


def linear_divergence(
    hidden: Tensor,  # [..., H] float32 / bfloat16 / float16
    weight: Tensor | TileSource,  # [V, H]
    teacher_hidden: Tensor,  # [..., H']
    teacher_weight: Tensor | TileSource,  # [V, H']
    *,
    kind: str,
    beta: float = 0.5,
    alpha: float = 0.5,
    mask: Tensor | None = None,  # [...] bool
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or one per token: [...]
    teacher_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    teacher_grad: bool = False,
    outputs: tuple[str, ...] = ("divergence",),
    budget: int | None = None,
    backend: str | None = None,
) -> DivergenceStats:
    """The divergence of student p and teacher q over the whole vocabulary, for every token.

    kind: "forward_kl" KL(q‖p); "reverse_kl" KL(p‖q); "jsd" β·KL(q‖m) + (1-β)·KL(p‖m) with
        m = β·q + (1-β)·p (arXiv:2306.13649), 0 and 1 being forward and reverse KL as in TRL;
        "alpha" (Σ q^α·p^{1-α} - 1)/(α·(α-1)), its limits at 0 and 1 the KLs; "tvd" ½·Σ|p - q|.
        No temperature² factor. beta in [0, 1] and alpha, finite, are read by their kind only.
    mask: False leaves a token out: 0, no gradient. None: all are scored.
    temperature: of each token where it is a tensor, as in `linear_logps`.
    teacher_temperature: None: that of the student.
    teacher_grad: gradient into the teacher's tensors, too, where they require it.
    outputs: of divergence and entropy.
    budget: bytes of products, float32 and of both heads, that may be kept for the backward; tokens
        above it are multiplied again. None: 4·V·H.
    backend: as in `linear_logps`; "cuda" has PyTorch's row kernels here.

    log-softmax and sums are computed from float32 products whatever the inputs are; gradients are
    summed in float32 and rounded once. Raises ValueError for shapes, dtypes, devices and options.
    A NaN or infinite hidden state gives NaN in its row.
    """
    weight, teacher_weight = tiled(weight), tiled(teacher_weight)
    everything = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask)
    check_plain("linear_divergence", everything)
    labels = labels_of(hidden, mask)
    check_tensors(hidden, weight, labels, bias)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_bias, labels)
    rule_of(kind, beta, alpha)
    check_names("outputs", outputs, _OUTPUTS)
    check_flag("teacher_grad", teacher_grad)
    left_out = None if mask is None else LEFT_OUT
    number, inverse = per_row(temperature, labels, left_out)
    tempered = temperature if teacher_temperature is None else teacher_temperature
    tempered, teacher_inverse = per_row(tempered, labels, left_out, "teacher_temperature")
    check_options(number, softcap, logit_scale, ("logps",), budget)
    check_map(tempered, teacher_softcap, teacher_logit_scale, of="teacher_")
    if not teacher_grad:
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    tensors = (
        *(hidden.reshape(-1, hidden.shape[-1]), weight, bias),
        *(teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_weight, teacher_bias),
    )
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    options = (
        *(float(number), softcap and float(softcap), float(logit_scale)),
        *(float(tempered), teacher_softcap and float(teacher_softcap), float(teacher_logit_scale)),
        *(kind, float(beta), float(alpha)),
        *(left_out, ",".join(outputs)),
        *(compute_dtype(hidden), compute_dtype(teacher_hidden)),
        *(registry.choose(backend, hidden.device), budget if trained else 0),
    )
    with stays():
        rows = labels.flatten(), inverse, teacher_inverse
        found = _Divergence.apply(*rows, options, *tensors)
    named = dict(zip(_OUTPUTS, found, strict=True))
    return DivergenceStats(**{name: named[name].view(labels.shape) for name in outputs})


# torch's custom operators take tensors and plain values only.
_SCHEMA = (
    "float temperature, float? softcap, float logit_scale, float teacher_temperature, "
    "float? teacher_softcap, float teacher_logit_scale, str kind, float beta, float alpha, "
    "int? ignore_index, str outputs, ScalarType dtype, ScalarType teacher_dtype, str backend, "
    "int? budget"
)


def _spec(
    inverses: Any,  # of student and teacher, [N] or None
    *options: Any,  # as the schema has them
) -> DivergenceSpec:
    kind, beta, alpha, ignore_index, outputs, dtype, teacher_dtype, backend, budget = options[6:]
    head = HeadSpec(
        logit_map=R.LogitMap(),
        ignore_index=ignore_index,
        outputs=("logps",),
        compute_dtype=torch.float32,
        backend=backend,
        hidden_grad=False,
        head_grad=False,
        budget=0,
    )
    student, teacher = (
        replace(R.LogitMap(*options[i : i + 3]), inverse=inverse)
        for i, inverse in zip((0, 3), inverses, strict=True)
    )
    rule = rule_of(kind, beta, alpha)
    dtypes = (dtype, teacher_dtype)
    return DivergenceSpec(head, (student, teacher), dtypes, rule, tuple(outputs.split(",")), budget)


def _forward(labels: Tensor, inverses: Any, tensors: Any, *options: Any) -> tuple[Tensor, ...]:
    return tuple(walk.forward(_operands(tensors), labels, _spec(inverses, *options)))


_forward_op = torch.library.custom_op(
    "fastpo::linear_divergence",
    _forward,
    mutates_args=(),
    schema=f"(Tensor labels, Tensor?[] inverses, Tensor?[] tensors, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(labels: Tensor, inverses: Any, tensors: Any, *options: Any) -> tuple[Tensor, ...]:
    return tuple(walk.fake_forward(_operands(tensors), labels, _spec(inverses, *options)))


def _backward(
    grad: Tensor, labels: Tensor, inverses: Any, saved: Any, tensors: Any, needs: Any, *options: Any
) -> list[Tensor]:
    """Of each tensor, empty where it needs none."""
    operands, (constants, totals, kept) = _operands(tensors), saved
    sides, spec = (needs[:3], needs[3:]), _spec(inverses, *options)
    found = walk.backward(grad, operands, labels, constants, totals, kept, spec, sides)
    grads: list[Tensor] = []
    for side, own in zip(found, operands, strict=True):
        bias = side.bias if side.bias is None or own.bias is None else side.bias.to(own.bias.dtype)
        grads += [grad.new_empty(0) if x is None else x for x in (side.hidden, side.weight, bias)]
    return grads


_backward_op = torch.library.custom_op(
    "fastpo::linear_divergence_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor labels, Tensor?[] inverses, Tensor[] saved, Tensor?[] tensors, "
    f"bool[] needs, {_SCHEMA}) -> Tensor[]",
)


@_backward_op.register_fake
def _(
    grad: Tensor, labels: Any, inverses: Any, saved: Any, tensors: Any, needs: Any, *_: Any
) -> list[Tensor]:
    pairs = zip(tensors, needs, strict=True)
    return [torch.empty_like(x) if need else grad.new_empty(0) for x, need in pairs]


def _traced(labels: Tensor) -> bool:
    """Then it is one operator of the graph, or of tensors that hold nothing."""
    return torch.compiler.is_compiling() or type(labels) is not Tensor


class _Divergence(torch.autograd.Function):
    """Of labels, inverses, options, then hidden, weight and bias of student and teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        inverse: Tensor | None,
        teacher_inverse: Tensor | None,
        options: tuple,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        run = _forward_op if _traced(labels) else _forward
        inverses = inverse, teacher_inverse
        divergence, entropy, *saved = run(labels, inverses, tensors, *options)
        ctx.save_for_backward(labels, *inverses, *saved, *tensors)
        ctx.options = options
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        check_plain("linear_divergence", (grad,))
        labels, *saved = ctx.saved_tensors
        inverses, saved, tensors = saved[:2], saved[2:5], saved[5:]
        needs = ctx.needs_input_grad[4:]
        run = _backward_op if _traced(labels) else _backward
        found = run(grad, labels, inverses, saved, tensors, needs, *ctx.options)
        grads = tuple(x if need else None for x, need in zip(found, needs, strict=True))
        found = first_derivatives("linear_divergence", grads, (grad, *tensors))
        return *(None,) * 4, *found


def _operands(tensors: Any) -> list[Operands]:
    return [Operands(*tensors[:3]), Operands(*tensors[3:])]


def labels_of(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Any word where a token is scored: the heads compact by it."""
    check_whole(hidden=hidden, **given(mask=mask))
    labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    if mask is None:
        return labels
    if mask.device != hidden.device:
        raise ValueError(f"mask: expected device {hidden.device}, got {mask.device}")
    if mask.shape != labels.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected bool of shape {shape_of(labels)}, got {mask.dtype} of {shape_of(mask)}"
        )
    return labels.masked_fill(~mask, LEFT_OUT)


def rule_of(kind: str, beta: float, alpha: float) -> Rule:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_number("beta", beta, "a number in [0, 1]", lambda x: 0 <= x <= 1)
    check_number("alpha", alpha, "a finite number")
    return Rule.of(kind, float(beta), float(alpha))


def _check_teacher(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
) -> None:
    try:
        check_tensors(teacher_hidden, teacher_weight, labels, teacher_bias)
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from None
    if len(teacher_weight) != len(weight):
        raise ValueError(
            f"teacher_weight: expected {len(weight)} words as in weight, got {len(teacher_weight)}"
        )
    if teacher_hidden.device != hidden.device:
        raise ValueError(
            f"teacher_hidden: expected device {hidden.device}, got {teacher_hidden.device}"
        )

"""`linear_divergence`: how far a student's next-token distribution is from a teacher's.

Both distributions come from hidden states and heads; the logits [N, V] of either exist only as
tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .operators import Call, Operators, apart
from .rows import backend as R
from .rows import registry
from .rows.pair.backend import KINDS, Rule
from .tiles.tiled import TileSource, outside_graphs, tiled
from .walks import divergence as walk
from .walks.checks import (
    check_beside,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .shards.tokens import Tokens
    from .walks.vocab_shard import VocabShard

LEFT_OUT = -100
_OUTPUTS = ("divergence", "entropy")


class DivergenceStats(NamedTuple):
    """Per token, float32, nats, 0 where masked out; None where not requested.

    divergence: with gradient.  entropy: of the student, -Σ p log p, without gradient.
    """

    divergence: Tensor | None = None
    entropy: Tensor | None = None


def linear_divergence(
    hidden: Tensor,
    weight: Tensor | TileSource,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | TileSource,
    *,
    kind: str,
    beta: float = 0.5,
    alpha: float = 0.5,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
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
        "alpha" (Σ q^α·p^{1-α} - 1)/(α·(α-1)), its limits at 0 and 1 the KLs, the sum at most e^40,
        where its gradient ends; "tvd" ½·Σ|p - q|. No temperature² factor. beta in [0, 1] and
        alpha, finite, are read by their kind only.
    hidden, teacher_hidden: [..., H] and [..., H'], float32, bfloat16 or float16.
    weight, teacher_weight: [V, H] and [V, H'], or tile sources; bias, teacher_bias: [V].
    mask: [...] bool, False leaves a token out: 0, no gradient. None: all are scored.
    temperature: of each token where it is a tensor, as in `linear_logps`.
    teacher_temperature: None: that of the student.
    teacher_grad: gradient into the teacher's tensors, too, where they require it.
    outputs: of divergence and entropy.
    budget: bytes of products, float32 and of both heads, that may be kept for the backward; tokens
        above it are multiplied again. None: as in `linear_logps`.
    backend: as in `linear_logps`; "cuda" has PyTorch's row kernels here.

    log-softmax and sums are computed from float32 products whatever the inputs are; gradients are
    summed in float32 and rounded once. Raises ValueError for shapes, dtypes, devices and options.
    A NaN or infinite hidden state gives NaN in its row. What is infinite, since one side alone
    excludes a word by a logit of -inf, comes out as a large finite number.
    """
    student = Operands(hidden, tiled(weight), bias)
    teacher = Operands(teacher_hidden, tiled(teacher_weight), teacher_bias)
    options = DivergenceOptions(
        kind=kind,
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        logit_scale=logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        teacher_grad=teacher_grad,
        outputs=outputs,
        budget=budget,
        backend=backend,
    )
    return diverge(student, teacher, mask, options)


@dataclass(frozen=True)
class DivergenceOptions:
    """What `linear_divergence` takes as keywords.  name: who errors are of."""

    kind: str
    beta: float = 0.5
    alpha: float = 0.5
    temperature: float | Tensor = 1.0
    teacher_temperature: float | Tensor | None = None
    softcap: float | None = None
    teacher_softcap: float | None = None
    logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    teacher_grad: bool = False
    outputs: tuple[str, ...] = ("divergence",)
    budget: int | None = None
    backend: str | None = None
    shard: VocabShard | None = None
    name: str = "linear_divergence"

    def check(self) -> None:
        rule_of(self.kind, self.beta, self.alpha)
        check_names("outputs", self.outputs, _OUTPUTS)
        check_flag("teacher_grad", self.teacher_grad)

    def maps(self, labels: Tensor, left_out: int | None) -> tuple[tuple, list[Tensor | None]]:
        """Of both products, as the schema has them, and 1/temperature of each token."""
        number, inverse = per_row(self.temperature, labels, left_out)
        other = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        other, teacher_inverse = per_row(other, labels, left_out, "teacher_temperature")
        own = number, self.softcap, self.logit_scale
        theirs = other, self.teacher_softcap, self.teacher_logit_scale
        check_options(*own, ("logps",), self.budget)
        check_map(*theirs, of="teacher_")
        plain = tuple(x if x is None else float(x) for x in (*own, *theirs))
        return plain, [inverse, teacher_inverse]


def diverge(
    student: Operands,  # [..., H], [V, H] and [V]
    teacher: Operands,
    mask: Tensor | None,  # [...]
    options: DivergenceOptions,
    count: Callable[[int, Sequence[Tensor]], Tokens] | None = None,
) -> DivergenceStats:
    """`linear_divergence`; of the options' shard the weights hold the words.

    count: where others have tokens of their own: from how many are here, and their hidden states.
    """
    pair = [(x.hidden, x.weight, x.bias) for x in (student, teacher)]
    check_plain(options.name, (*pair[0], *pair[1], mask))
    labels = labels_of(student.hidden, mask)
    part = options.shard is not None
    check_tensors(student.hidden, student.weight, labels, student.bias, part=part)
    _check_teacher(student, teacher, labels, part)
    options.check()
    left_out = None if mask is None and count is None else LEFT_OUT
    maps, rows = options.maps(labels, left_out)
    rows = [labels.flatten(), *rows]
    tensors = [x for hidden, *head in pair for x in (hidden.reshape(-1, hidden.shape[-1]), *head)]
    tensors[3:] = [
        x if x is None or (options.teacher_grad and x.requires_grad) else x.detach()
        for x in tensors[3:]
    ]
    hiddens = [x for x in tensors[::3] if x is not None]
    tokens = None if count is None else count(labels.numel(), hiddens)
    if tokens is not None:
        rows = [x if x is None else tokens.gather(x) for x in rows]
        tensors[::3] = [tokens.gather_hidden(x, i) for i, x in enumerate(hiddens)]
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    plain = (
        *maps,
        *(options.kind, float(options.beta), float(options.alpha)),
        *(left_out, ",".join(options.outputs)),
        *(compute_dtype(student.hidden), compute_dtype(teacher.hidden)),
        registry.choose(options.backend, student.hidden.device),
        options.budget if trained else 0,
    )
    call = Call(options.name, plain, options.shard)
    with stays():
        run = outside_graphs(_Divergence.apply, student.weight, teacher.weight)
        found = run(*rows, call, *apart(tensors))
    if tokens is not None:
        found = map(tokens.own, found)
    named = dict(zip(_OUTPUTS, found, strict=True))
    return DivergenceStats(**{name: named[name].view(labels.shape) for name in options.outputs})


# torch's custom operators take tensors and plain values only.
_SCHEMA = (
    "float temperature, float? softcap, float logit_scale, float teacher_temperature, "
    "float? teacher_softcap, float teacher_logit_scale, str kind, float beta, float alpha, "
    "int? ignore_index, str outputs, ScalarType dtype, ScalarType teacher_dtype, str backend, "
    "int? budget"
)


def _spec(
    rows: Any,  # labels, and 1/temperature of student and teacher, [N] or None
    *options: Any,  # as the schema has them
    shard: VocabShard | None,
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
        shard=shard,
    )
    student, teacher = (
        replace(R.LogitMap(*options[i : i + 3]), inverse=inverse)
        for i, inverse in zip((0, 3), rows[1:], strict=True)
    )
    rule = rule_of(kind, beta, alpha)
    dtypes = (dtype, teacher_dtype)
    return DivergenceSpec(head, (student, teacher), dtypes, rule, tuple(outputs.split(",")), budget)


def _forward(rows: Any, tensors: Any, spec: DivergenceSpec) -> walk.Saved:
    return walk.forward(_operands(tensors), rows[0], spec)


def _fake_forward(rows: Any, tensors: Any, spec: DivergenceSpec) -> walk.Saved:
    return walk.fake_forward(_operands(tensors), rows[0], spec)


def _backward(
    grads: Any, rows: Any, tensors: Any, saved: Any, needs: Any, spec: DivergenceSpec
) -> list[Tensor | None]:
    (grad,), (constants, totals, kept), sides = grads, saved, (needs[:3], needs[3:])
    call = _operands(tensors), rows[0], constants, totals, kept, spec, sides
    return [x for side in walk.backward(grad, *call) for x in side]


_OPERATORS = Operators(
    "linear_divergence",
    _SCHEMA,
    spec=_spec,
    forward=_forward,
    backward=_backward,
    fake=_fake_forward,
)


class _Divergence(torch.autograd.Function):
    """Of labels, inverses, the call, then hidden, weight and bias of student and teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        inverse: Tensor | None,
        teacher_inverse: Tensor | None,
        call: Call,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows = labels, inverse, teacher_inverse
        divergence, entropy, *saved = _OPERATORS.forward(call, rows, tensors)
        ctx.save_for_backward(*rows, *saved, *tensors)
        ctx.call = call
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        check_plain(ctx.call.name, (grad,))
        kept = ctx.saved_tensors
        rows, saved, tensors = kept[:3], kept[3:6], kept[6:]
        needs = ctx.needs_input_grad[4:]
        found = _OPERATORS.backward(ctx.call, (grad,), rows, tensors, saved, needs)
        found = first_derivatives(ctx.call.name, found, (grad, *tensors))
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


def _check_teacher(student: Operands, teacher: Operands, labels: Tensor, part: bool) -> None:
    check_beside(teacher.hidden, teacher.weight, labels, teacher.bias, of="teacher_", part=part)
    words = len(student.weight)
    if len(teacher.weight) != words:
        raise ValueError(
            f"teacher_weight: expected {words} words as in weight, got {len(teacher.weight)}"
        )

"""`mixed_linear_logps`: log-probabilities under a mixture of heads' logits, renormalised."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .operators import Call, Operators, apart
from .rows import backend as R
from .rows import registry
from .stats import TokenStats, handed_out
from .tiles.tiled import TileSource, outside_graphs, tiled
from .walks import mixture
from .walks.checks import (
    OUTPUTS,
    check_beside,
    check_number,
    check_options,
    check_tensors,
    compute_dtype,
    shape_of,
)
from .walks.derivatives import check_plain, first_derivatives
from .walks.forward import fake_finish
from .walks.head import Forward, HeadSpec
from .walks.saving import stays

if TYPE_CHECKING:
    from .walks.vocab_shard import VocabShard

_LARGEST = torch.finfo(torch.float32).max
_NO_CAP = 0.0  # a list of an operator's numbers holds no None


def mixed_linear_logps(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor | TileSource],
    coefficients: Sequence[float] | Tensor,
    labels: Tensor,
    *,
    biases: Sequence[Tensor | None] | None = None,
    temperature: float = 1.0,
    softcaps: Sequence[float | None] | None = None,
    logit_scales: Sequence[float] | None = None,
    ignore_index: int | None = -100,
    outputs: tuple[str, ...] = ("logps",),
    backend: str | None = None,
) -> TokenStats:
    """log softmax(Σ_i m_i·z_i / temperature)[label], z_i = softcap_i(scale_i·(h_i·W_iᵀ + b_i)).

    The geometric mixture of policies, Π_i p_i^m_i renormalised: m, 1 - m for a policy and its
    reference in Nash-MD (arXiv:2312.00886) and SPA (arXiv:2406.04412). All statistics of
    `linear_logps` are those of the mixture. One mixed tile and one tile of a head's logits are
    alive at a time; nothing is kept for the backward, which multiplies M times more than once.

    hiddens: M of [..., H_i], float32, bfloat16 or float16.  weights, biases: M of [V, H_i] and [V].
    coefficients: M numbers, or a tensor [M], or [..., M] for each token, finite in float32; what
        stands at ignored tokens is not read.
    labels: [...] int64, in [0, V) or ignore_index; labels[i] is scored by hidden[i], unshifted.
    softcaps, logit_scales: M, one for each head.

    Gradient flows from logps, entropy and lse to every hidden, weight and bias that requires it,
    not to the coefficients. A word that one head excludes by a logit of -inf is excluded from the
    mixture where that head's coefficient is > 0, and gives NaN where it is 0.

    Raises ValueError for shapes, dtypes, devices, options, coefficients that require gradient
    and, on a CPU, labels and numbers of a tensor of coefficients that cannot be; on a GPU these
    make their rows NaN. RuntimeError
    when a named backend is missing. A NaN or infinite hidden state gives NaN in its row.
    """
    operands = operands_of(hiddens, weights, biases)
    options = MixtureOptions(temperature, softcaps, logit_scales, ignore_index, outputs, backend)
    return mix(operands, coefficients, labels, options)


@dataclass(frozen=True)
class MixtureOptions:
    """What `mixed_linear_logps` takes as keywords.  name: who errors are of."""

    temperature: float
    softcaps: Sequence[float | None] | None
    logit_scales: Sequence[float] | None
    ignore_index: int | None
    outputs: tuple[str, ...]
    backend: str | None
    shard: VocabShard | None = None
    name: str = "mixed_linear_logps"

    def call(self, hiddens: Sequence[Tensor], device: torch.device) -> Call:
        softcaps = _one_per_head("softcaps", self.softcaps, len(hiddens), None)
        scales = _one_per_head("logit_scales", self.logit_scales, len(hiddens), 1.0)
        for own in zip(softcaps, scales, strict=True):
            check_options(self.temperature, *own, self.outputs, None, self.ignore_index)
        plain = (
            float(self.temperature),
            [_NO_CAP if cap is None else float(cap) for cap in softcaps],
            [float(scale) for scale in scales],
            self.ignore_index,
            ",".join(x for x in OUTPUTS if x in self.outputs or x == "logps"),
            ",".join(str(compute_dtype(x)).removeprefix("torch.") for x in hiddens),
            registry.choose(self.backend, device),
        )
        return Call(self.name, plain, self.shard)


def operands_of(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor | TileSource],
    biases: Sequence[Tensor | None] | None,
) -> list[mixture.Operands]:
    heads = _count("hiddens", hiddens)
    if not heads:
        raise ValueError("hiddens: expected at least one head, got none")
    if _count("weights", weights) != heads:
        raise ValueError(f"weights: expected {heads} entries, got {len(weights)}")
    biases = _one_per_head("biases", biases, heads, None)
    return [
        mixture.Operands(hidden, tiled(weight), bias)
        for hidden, weight, bias in zip(hiddens, weights, biases, strict=True)
    ]


def mix(
    operands: list[mixture.Operands],
    coefficients: Sequence[float] | Tensor,
    labels: Tensor,  # [...]
    options: MixtureOptions,
) -> TokenStats:
    """`mixed_linear_logps`; of the options' shard the weights hold the words."""
    hiddens, words, biases = zip(*((x.hidden, x.weight, x.bias) for x in operands), strict=True)
    weighing = coefficients if isinstance(coefficients, Tensor) else None
    check_plain(options.name, (*hiddens, *words, *biases, weighing, labels))
    _check_heads(operands, labels, options.shard is not None)
    call = options.call(hiddens, labels.device)
    own = _weights_of_heads(coefficients, len(operands), labels)
    rows = (hidden.reshape(-1, hidden.shape[-1]) for hidden in hiddens)
    with stays():
        run = outside_graphs(_MixedLinearLogps.apply, *words)
        results = run(labels.reshape(-1), own, call, *apart((*rows, *words, *biases)))
    fields = dict(zip(OUTPUTS, results, strict=True))
    return handed_out({name: fields[name] for name in options.outputs}, labels.shape)


# What `MixtureOptions.call` gives; lists have an entry for each head.
_SCHEMA = (
    "float temperature, float[] softcaps, float[] logit_scales, int? ignore_index, str outputs, "
    "str dtypes, str backend"
)


def _spec(
    _: Any,
    temperature: float,
    softcaps: Sequence[float],
    scales: Sequence[float],
    ignore_index: int | None,
    outputs: str,
    dtypes: str,
    backend: str,
    *,
    shard: VocabShard | None,
) -> mixture.MixtureSpec:
    head = HeadSpec(
        logit_map=R.LogitMap(temperature),
        ignore_index=ignore_index,
        outputs=tuple(outputs.split(",")),
        compute_dtype=torch.float32,
        backend=backend,
        hidden_grad=False,
        head_grad=False,
        budget=0,
        shard=shard,
    )
    maps = (
        R.LogitMap.of(1.0, None if cap == _NO_CAP else cap, scale)
        for cap, scale in zip(softcaps, scales, strict=True)
    )
    each = (getattr(torch, dtype) for dtype in dtypes.split(","))
    return mixture.MixtureSpec(head, tuple(maps), tuple(each))


def _forward(rows: Any, tensors: Any, spec: mixture.MixtureSpec) -> Forward:
    labels, coefficients = rows
    return mixture.forward(_operands(tensors), coefficients, labels, spec)


def _fake_forward(_: Any, tensors: Any, spec: mixture.MixtureSpec) -> Forward:
    return fake_finish(tensors[0], spec.head)


def _backward(
    grads: Any, rows: Any, tensors: Any, saved: Any, needs: Any, spec: mixture.MixtureSpec
) -> list[Tensor | None]:
    labels, coefficients = rows
    given = dict(zip(("logps", "entropy", "lse"), grads, strict=True))
    if "entropy" not in spec.head.outputs:  # in a graph its gradient is an empty tensor
        given["entropy"] = None
    call = _operands(tensors), coefficients, labels, Forward(*saved), spec
    found = mixture.backward(given, *call, _per_head(needs))
    return [x for kind in zip(*found, strict=True) for x in kind]  # as `tensors` come


_OPERATORS = Operators(
    "mixed_linear_logps",
    _SCHEMA,
    spec=_spec,
    forward=_forward,
    backward=_backward,
    fake=_fake_forward,
)


class _MixedLinearLogps(torch.autograd.Function):
    """Of labels, coefficients, the call, then M hidden states, M weights and M biases."""

    @staticmethod
    def forward(
        ctx: Any, labels: Tensor, coefficients: Tensor, call: Call, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        stats = Forward(*_OPERATORS.forward(call, (labels, coefficients), tensors))
        ctx.call = call
        ctx.save_for_backward(labels, coefficients, *stats, *tensors)
        ctx.mark_non_differentiable(stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1)
        # Statistics are often only logged: their absent gradients shall not arrive as zeros.
        ctx.set_materialize_grads(False)
        return tuple(getattr(stats, name) for name in OUTPUTS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_plain(ctx.call.name, grads)
        labels, coefficients, *kept = ctx.saved_tensors
        count = len(Forward._fields)
        (stats, tensors), rows = (kept[:count], kept[count:]), (labels, coefficients)
        by_name = dict(zip(OUTPUTS, grads, strict=True))
        given = [by_name[name] for name in ("logps", "entropy", "lse")]
        needs = ctx.needs_input_grad[3:]
        found = _OPERATORS.backward(ctx.call, given, rows, tensors, stats, needs)
        return None, None, None, *first_derivatives(ctx.call.name, found, (*grads, *tensors))


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


def _check_heads(operands: Sequence[mixture.Operands], labels: Tensor, part: bool) -> None:
    for i, head in enumerate(operands):
        check = check_beside if i else check_tensors
        check(head.hidden, head.weight, labels, head.bias, of=f"head {i}: ", part=part)
        words = len(operands[0].weight)
        if len(head.weight) != words:
            raise ValueError(
                f"head {i}: weight: expected {words} words as in head 0, got {len(head.weight)}"
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
            check_number(
                "coefficients", value, f"{expected} of float32", lambda x: abs(x) <= _LARGEST
            )
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
    found = coefficients.detach().float()
    return found.reshape((-1, heads) if found.dim() > labels.dim() else heads)

"""`linear_logps`: per-token log-probabilities and statistics of a language-model head.

The logits [N, V] exist only as tiles of a few megabytes. Forward 1 matrix product, 2 with d hidden
for a frozen head; forward and backward of a trainable head 3, and 4 for tokens above the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .rows import backend as R
from .rows import fastest
from .stats import TokenStats, handed_out
from .support.resolve import check_support
from .support.words import Rule, Support
from .tiles.tiled import Tiled, TileSource, outside_graphs, tiled
from .walks import forward as driver
from .walks.checks import OUTPUTS, check_options, check_tensors, compute_dtype, per_row
from .walks.derivatives import check_plain, first_derivatives, refused, transforming
from .walks.lending import Loan
from .walks.saving import stays


def linear_logps(
    hidden: Tensor,
    weight: Tensor | TileSource,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    outputs: tuple[str, ...] = ("logps",),
    support: Tensor | Support | Rule | None = None,
    outside: str = "error",
    budget: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """log softmax(z)[label] with z = softcap(logit_scale·(hidden·weightᵀ + bias)) / temperature.

    Statistics come from float32 logits; gradients are summed in float32 and rounded once. Inside
    autocast the products run in its dtype (on a CPU in float32 in any case).

    A token's log-probability, entropy and log-sum-exp have the same bits wherever its row stands,
    whatever the other rows are, with and without gradient: on a CPU on every backend, on a GPU on
    "anchored" and "cutlass". On the others there cuBLAS chooses a kernel by the number of rows.

    hidden: [..., H] float32, bfloat16 or float16.
    weight: [V, H]. A tile source, of a quantised head for one (`fastpo.tile_source`), makes words a
        tile at a time and is frozen; "anchored" and "cutlass" run as "triton" on it.
    labels: [...] int64, in [0, V) or ignore_index. labels[i] is the word scored by hidden[i];
        nothing is shifted: for next tokens pass hidden[:, :-1] with ids[:, 1:].
    temperature: a number, or a tensor of any shape that broadcasts to the labels' and gives each
        token its own, with no gradient; what stands at ignored tokens is not read.
    bias: [V]. Also what the field calls logit_bias or, as the logarithm of weights, class weights.
    ignore_index: rows with this label give 0 and receive no gradient. None: every row is scored,
        which on a GPU saves masking the hidden states.
    outputs: names of the `TokenStats` fields to compute.
    support: the words that the sampler kept for each token: ids [..., k] padded with -1, a
        `fastpo.Support` or its `rule`. The softmax, all statistics and the gradient are over these
        words alone; a token without any has no restriction. A few words are multiplied by
        themselves, more in the tiles of all (`fastpo.planner.gathered_words`). On a device this
        waits for it.
    outside: what a label that is not among its token's words makes of it: "error", on a GPU NaN;
        "raw", the log-probability over the whole vocabulary; "drop", 0 and no gradient.
    budget: bytes of probabilities that may be kept for the backward of a trainable head; tokens
        above it are recomputed. None: 4·V·H, on a GPU a sixteenth of its memory where that is more;
        see `fastpo.plan`.
    backend: "triton", "anchored", "cutlass", "cuda", "cpu" or "torch"; None: on a GPU that was
        measured (`fastpo bench choose`) the fastest there, else the best that is there, "anchored"
        and "cutlass" excepted. These two write no logits, for bfloat16 products without a soft-cap,
        and run as "triton" elsewhere; results differ from those of "triton" in last bits, and a tie
        makes the label top-1. "cutlass" takes the product of "anchored" where rows do not start
        at multiples of 16 bytes.

    Raises ValueError for shapes, dtypes, devices, DTensors, options and, on a CPU, wrong labels
    (on a GPU a label outside the vocabulary makes its row NaN instead, because reading it would
    wait for the device). RuntimeError when a named backend is missing, and in this and all other
    primitives where a gradient is differentiated again, in forward-mode AD and under torch.func's
    transforms. A NaN or infinite hidden state gives a NaN log-probability in its row.
    """
    weight = tiled(weight)
    check_plain("linear_logps", (hidden, weight, labels, bias))
    check_tensors(hidden, weight, labels, bias)
    number, inverse = per_row(temperature, labels, ignore_index)
    check_options(number, softcap, logit_scale, outputs, budget, ignore_index)
    check_support(support, outside, labels)
    if backend is not None and not isinstance(backend, str):
        raise ValueError(f"backend: expected a name or None, got {backend!r}")
    if support is not None:
        operands = hidden, weight, bias, labels, inverse
        given = number, softcap, logit_scale, outputs, budget, backend
        return _over_support(support, outside, operands, given, ignore_index)
    grad = torch.is_grad_enabled()
    head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    with stays():
        results = _called(hidden, weight, bias, labels)(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            labels.reshape(-1),
            inverse,
            float(number),
            None if softcap is None else float(softcap),
            float(logit_scale),
            ignore_index,
            ",".join(name for name in OUTPUTS if name in outputs or name == "logps"),
            compute_dtype(hidden),
            backend,
            grad and hidden.requires_grad,
            grad and head_grad,
            budget,
            # A compiled operator may not return memory of an argument.
            weight.requires_grad and not torch.compiler.is_compiling(),
        )
    fields = dict(zip(driver.Forward._fields, results, strict=True))
    return handed_out({name: fields[name] for name in outputs}, labels.shape)


def _over_support(
    support: Tensor | Support | Rule,
    outside: str,
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    given: tuple,
    ignore_index: int | None,
) -> TokenStats:
    # It imports torch.distributed, which takes half a second.
    from .shards.gathered import HeadOptions
    from .support.score import score_over

    chosen = replace(HeadOptions(*given), ignore_index=ignore_index, name="linear_logps")
    hidden, weight, bias, labels, inverse = operands
    rows = hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), chosen
    if isinstance(support, Tensor):
        support = support.reshape(labels.numel(), support.shape[-1])
    stats = score_over(support, outside, *rows, inverse=inverse)
    results = {name: x for name, x in stats._asdict().items() if x is not None}
    return handed_out(results, labels.shape)


def _spec(
    hidden: Tensor,
    inverse: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    outputs: str,
    dtype: torch.dtype,
    backend: str | None,
    hidden_grad: bool,
    head_grad: bool,
    budget: int | None,
    lends: bool,
) -> driver.HeadSpec:
    return driver.HeadSpec(
        R.LogitMap(temperature, softcap, logit_scale, inverse),
        ignore_index,
        tuple(outputs.split(",")),
        dtype,
        fastest.choose(backend, hidden.device, dtype, hidden.shape[-1]),
        hidden_grad,
        head_grad,
        budget,
        lends,
        anchors=True,
    )


# Flat schemas: torch's custom operators take tensors and plain values only. With an autograd of its
# own, unlike `Operators`: a compiler hands an autograd.Function zeros as gradients of results that
# are only logged, for which a frozen head would compute all logits again.
@torch.library.custom_op("fastpo::linear_logps", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse: Tensor | None,  # [N] float64, 1/temperature
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    outputs: str,
    dtype: torch.dtype,
    backend: str | None,
    hidden_grad: bool,
    head_grad: bool,
    budget: int | None,
    lends: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    spec = _spec(
        hidden,
        inverse,
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        outputs,
        dtype,
        backend,
        hidden_grad,
        head_grad,
        budget,
        lends,
    )
    return tuple(driver.forward(hidden, weight, bias, labels, spec))  # type: ignore[return-value]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(driver.forward(hidden, weight, bias, labels, _spec(hidden, *options)))


@_forward_op.register_torch_dispatch(Tiled)
def _(_: Any, func: Any, types: Any, args: tuple, kwargs: Any) -> tuple:
    return _forward(*args)


@_forward_op.register_vmap
def _(info: Any, in_dims: Any, *_: Any) -> Any:
    raise refused("linear_logps", "torch.func.vmap")


@_forward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, *options: Any) -> tuple:
    return tuple(driver.fake_forward(hidden, weight, _spec(hidden, *options)))


@torch.library.custom_op("fastpo::linear_logps_backward", mutates_args=())
def _backward_op(
    grads: list[Tensor | None],  # logps, entropy, lse: each [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse: Tensor | None,
    saved: list[Tensor],
    needs: list[bool],
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    outputs: str,
    dtype: torch.dtype,
    backend: str | None,
    hidden_grad: bool,
    head_grad: bool,
    budget: int | None,
    lends: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _spec(
        hidden,
        inverse,
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        outputs,
        dtype,
        backend,
        hidden_grad,
        head_grad,
        budget,
        lends,
    )
    found = _walk_back(grads, hidden, weight, bias, labels, saved, needs, spec, None)
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in found)
    return dhidden, dweight, dbias


@_backward_op.register_fake
def _(
    grads: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    labels: Any,
    inverse: Any,
    saved: Any,
    needs: Any,
    *_: Any,
) -> tuple:
    operands = (hidden, weight, bias)
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0)  # however x lies
        for x, need in zip(operands, needs, strict=True)
    )


def _walk_back(
    grads: Sequence[Tensor | None],  # logps, entropy, lse: each [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    spec: driver.HeadSpec,
    loan: Loan | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    by_name = dict(zip(("logps", "entropy", "lse"), grads, strict=True))
    need_hidden, need_weight, need_bias = needs
    dhidden, dweight, dbias = driver.backward(
        by_name,
        hidden,
        weight,
        bias,
        labels,
        driver.Forward(*saved),
        spec,
        (need_hidden, need_weight, need_bias),
        loan=loan,
    )
    return dhidden, dweight, dbias if bias is None or dbias is None else dbias.to(bias.dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, labels, inverse, *options = inputs
    # Statistics are often only logged: without this their absent gradients arrive as zeros, and a
    # frozen head would recompute all logits for nothing.
    ctx.set_materialize_grads(False)
    fields = driver.Forward(*output)
    ctx.mark_non_differentiable(
        fields.target,
        fields.maximum,
        fields.log_mass,
        fields.log_sum_sq_probs,
        fields.mean_logits,
        fields.is_top1,
        fields.kept,
        fields.anchors,
        fields.direction,
    )
    ctx.save_for_backward(hidden, weight, bias, labels, inverse, *output)
    ctx.options, ctx.loan = options, Loan()


def _backward(ctx: Any, *results: Any) -> tuple:
    grads = driver.Forward(*results)
    hidden, weight, bias, labels, inverse, *saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    given = [grads.logps, grads.entropy, grads.lse]
    check_plain("linear_logps", given)
    operands = (hidden, weight, bias)
    found: Any
    kept = driver.Forward(*saved).kept
    if type(kept) is Tensor and not kept.is_meta and not torch.compiler.is_compiling():
        spec = _spec(hidden, inverse, *ctx.options)
        found = _walk_back(given, *operands, labels, saved, needs, spec, ctx.loan)
    else:  # traced, or empty: an operator may not return memory of an argument
        *options, _ = ctx.options
        found = _backward_op(given, *operands, labels, inverse, saved, needs, *options, False)
    leaves = tuple(x if need else None for x, need in zip(found, needs, strict=True))
    leaves = first_derivatives("linear_logps", leaves, (*given, *operands))
    return (*leaves, *(None for _ in range(2 + len(ctx.options))))


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class LinearLogps(torch.autograd.Function):  # as profilers name it
    """The operator without what PyTorch puts around one, a sixth of the time of a small head."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results = _forward(*inputs)
        _setup_context(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return _backward(ctx, *grads)


def _called(*tensors: Tensor | None) -> Callable[..., Any]:
    """The operator where somebody looks at it: a compiler, a trace, a dispatch mode, a kind of
    tensor."""
    plain = all(x is None or (type(x) in _PLAIN and not x.is_meta) for x in tensors)
    seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not plain or seen or torch.jit.is_tracing() or transforming():
        return outside_graphs(_forward_op, *(x for x in tensors if x is not None))
    trained = any(x is not None and x.requires_grad for x in tensors)
    return LinearLogps.apply if trained and torch.is_grad_enabled() else _forward


_PLAIN = (Tensor, torch.nn.Parameter, Tiled)

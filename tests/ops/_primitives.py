"""Calls of every primitive on one small problem, for what all of them have to keep to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from _tile_sources import Sliced
from torch import Tensor

import fastpo
from fastpo.ops.rows import registry
from fastpo.ops.rows.pair.backend import KINDS
from fastpo.ops.shards.gathered import HeadOptions, score
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import make_head

N, V, H, HEADS, LISTED, RANK = 7, 37, 8, 2, 3, 2
BACKENDS = [b for b in registry.BACKENDS if registry.unavailable(b, torch.device("cpu")) is None]
Leaves = dict[str, Tensor]
OPTIONS: dict[str, Any] = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.3}
BOTH = {"softcaps": (9.0, None), "logit_scales": (1.3, 0.5)}


def problem(dtype: torch.dtype, device: str) -> Leaves:
    """All that any call takes; leaves of its own each time."""
    heads = [make_head(N, V, H, dtype=dtype, bias=True, ignored=0.3, seed=i) for i in range(HEADS)]
    first, other = heads
    assert first.bias is not None and other.bias is not None
    found = {
        "hidden": first.hidden,
        "weight": first.weight,
        "bias": first.bias,
        "other_hidden": other.hidden,
        "other_weight": other.weight,
        "other_bias": other.bias,
        "weights": torch.stack([first.weight, other.weight]),
        "biases": torch.stack([first.bias, other.bias]),
        "down": other.hidden[:, :RANK].contiguous(),
        "up": other.weight[:, :RANK].contiguous(),
        "labels": first.labels,
        "words": first.labels.clamp_min(0),
        "mask": first.labels >= 0,
        "heads": first.labels % HEADS,
        "ids": other.weight.float().topk(LISTED, 0).indices[:, :1].t().expand(N, -1).contiguous(),
        "listed": other.hidden[:, :LISTED].float().log_softmax(-1) - 0.1,
        "coefficients": torch.sigmoid(other.hidden[:, :HEADS].float()),
    }
    on_host = ("heads",)  # or the call waits for them
    places = {name: "cpu" if name in on_host else device for name in found}
    return {name: x.to(places[name], copy=True) for name, x in found.items()}


@dataclass(frozen=True)
class Call:
    """name: of the primitive, as its errors say.  trained: leaves that require a gradient."""

    name: str
    function: Callable[..., Sequence[Tensor | None]]
    trained: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    def leaves(self, device: str = "cpu") -> Leaves:
        leaves = problem(self.dtype, device)
        for name in self.trained:
            leaves[name].requires_grad_()
        return leaves

    def outputs(self, leaves: Leaves, **options: Any) -> list[Tensor]:
        return [x for x in self.function(leaves, **options) if x is not None]

    def gradients(self, leaves: Leaves, **options: Any) -> list[Tensor]:
        """Outputs, and the gradients of `loss`."""
        outputs = self.outputs(leaves, **options)
        found = [x.detach() for x in outputs]
        if not self.trained:
            return found
        trained = [leaves[name] for name in self.trained]
        return found + list(torch.autograd.grad(loss(outputs), trained))


def loss(outputs: Sequence[Tensor]) -> Tensor:
    """Of all outputs that have a gradient, every row with a factor of its own."""
    return torch.stack([(x * _factors(x)).sum() for x in outputs if x.requires_grad]).sum()


def _factors(x: Tensor) -> Tensor:
    rising = torch.arange(1, x.numel() + 1, dtype=torch.float32, device=x.device)
    return (rising / x.numel()).view(x.shape)


def _logps(x: Leaves, **options: Any) -> fastpo.TokenStats:
    given = {"bias": x["bias"], "outputs": OUTPUTS, "budget": 2**40, **OPTIONS} | options
    return fastpo.linear_logps(x["hidden"], x["weight"], x["labels"], **given)


def _tiles(x: Leaves, **options: Any) -> fastpo.TokenStats:
    return _logps({**x, "weight": Sliced(x["weight"])}, **options)


def _multi_token(x: Leaves, **options: Any) -> fastpo.TokenStats:
    given = {"bias": x["bias"], "outputs": OUTPUTS, "budget": 2**40, **OPTIONS} | options
    depths = x["hidden"], x["other_hidden"]
    return fastpo.multi_token_logps(depths, x["weight"], x["labels"], **given)


def _vocab_parallel(x: Leaves, **options: Any) -> fastpo.TokenStats:
    given = {"bias": x["bias"], "outputs": OUTPUTS, "first": 0, "vocab": V, **OPTIONS} | options
    return fastpo.vocab_parallel_logps(x["hidden"], x["weight"], x["labels"], **given)


def _score(x: Leaves, adapted: bool = False, **options: Any) -> fastpo.TokenStats:
    given = HeadOptions(**{"outputs": OUTPUTS, **OPTIONS} | options)
    adapter = (x["down"], x["up"]) if adapted else None
    return score(x["hidden"], x["weight"], x["bias"], x["words"], given, adapter=adapter)


def _divergence(x: Leaves, **options: Any) -> fastpo.DivergenceStats:
    given = {
        "bias": x["bias"],
        "teacher_bias": x["other_bias"],
        "teacher_grad": True,
        "mask": x["mask"],
        "outputs": ("divergence", "entropy"),
        **OPTIONS,
    }
    teacher = x["other_hidden"], x["other_weight"]
    return fastpo.linear_divergence(x["hidden"], x["weight"], *teacher, **given | options)


def _divergence_in_shards(x: Leaves, **options: Any) -> fastpo.DivergenceStats:
    given = {"first": 0, "vocab": V, "bias": x["bias"], "kind": "jsd", "mask": x["mask"]}
    given |= {"outputs": ("divergence", "entropy"), "teacher_grad": True, **OPTIONS, **options}
    teacher = x["other_hidden"], x["other_weight"]
    return fastpo.vocab_parallel_divergence(x["hidden"], x["weight"], *teacher, **given)


def _topk_divergence(x: Leaves, **options: Any) -> tuple[Tensor]:
    given = {"bias": x["bias"], "mask": x["mask"], **OPTIONS} | options
    teacher = x["ids"], x["listed"]
    return (fastpo.linear_topk_divergence(x["hidden"], x["weight"], *teacher, **given),)


def _topk(x: Leaves, **options: Any) -> fastpo.TopK:
    given = {"bias": x["bias"], "mask": x["mask"], "exclude": x["labels"], **OPTIONS} | options
    return fastpo.linear_topk(x["hidden"], x["weight"], LISTED, **given)


def _topk_in_shards(x: Leaves, **options: Any) -> fastpo.TopK:
    given = {"bias": x["bias"], "mask": x["mask"], "exclude": x["labels"], **OPTIONS, **options}
    given = {"first": 0, "vocab": V} | given
    return fastpo.vocab_parallel_topk(x["hidden"], x["weight"], LISTED, **given)


def _sample(x: Leaves, **options: Any) -> fastpo.TokenSample:
    torch.manual_seed(0)
    return fastpo.sample_topk(_topk(x, **options), temperature=0.7)


def _mixed(x: Leaves, per_token: bool = False, **options: Any) -> fastpo.TokenStats:
    coefficients: Any = x["coefficients"] if per_token else (0.7, 0.4)
    heads = [x["hidden"], x["other_hidden"]], [x["weight"], x["other_weight"]]
    given = {"biases": [x["bias"], None], "outputs": OUTPUTS, "temperature": 0.7, **BOTH} | options
    return fastpo.mixed_linear_logps(*heads, coefficients, x["labels"], **given)


def _mixed_in_shards(x: Leaves, **options: Any) -> fastpo.TokenStats:
    heads = [x["hidden"], x["other_hidden"]], [x["weight"], x["other_weight"]]
    given = {"biases": [x["bias"], None], "outputs": OUTPUTS, **BOTH, **options}
    given = {"first": 0, "vocab": V, "temperature": 0.7} | given
    return fastpo.vocab_parallel_mixed_logps(*heads, (0.7, 0.4), x["labels"], **given)


def _multi_head(x: Leaves, **options: Any) -> fastpo.TokenStats:
    given = {"bias": x["biases"], "outputs": OUTPUTS, **OPTIONS} | options
    return fastpo.multi_head_logps(x["hidden"], x["weights"], x["labels"], x["heads"], **given)


# Of a graph, where the weight is a tensor: the shapes of their results are known without a walk.
OPERATORS = (
    "linear_logps",
    "linear_divergence",
    "linear_topk",
    "sample_topk",
    "mixed_linear_logps",
    "multi_token_logps",
)
HEAD = ("hidden", "weight", "bias")
PAIR = (*HEAD, "other_hidden", "other_weight")
# One call of each.
PRIMITIVES = {
    call.name: call
    for call in (
        Call("linear_logps", _logps, HEAD),
        Call("linear_divergence", partial(_divergence, kind="jsd"), (*PAIR, "other_bias")),
        Call("linear_topk_divergence", partial(_topk_divergence, kind="jsd"), HEAD),
        Call("linear_topk", _topk, HEAD),
        Call("mixed_linear_logps", _mixed, PAIR),
        Call("multi_head_logps", _multi_head, ("hidden", "weights", "biases")),
        Call("vocab_parallel_logps", _vocab_parallel, HEAD),
        Call("vocab_parallel_divergence", _divergence_in_shards, PAIR),
        Call("vocab_parallel_topk", _topk_in_shards, HEAD),
        Call("vocab_parallel_mixed_logps", _mixed_in_shards, PAIR),
        Call("fastpo", _score, HEAD),
    )
}


def _with(name: str, **options: Any) -> Call:
    call = PRIMITIVES[name]
    return replace(call, function=partial(call.function, **options))


ROWS = 4 * V  # bytes of a row's probabilities
# The other ways through them.
CALLS = PRIMITIVES | {
    "logps of no gradient": replace(PRIMITIVES["linear_logps"], trained=()),
    "logps of a frozen head": replace(PRIMITIVES["linear_logps"], trained=("hidden",)),
    "logps of a lean head": _with("linear_logps", budget=3 * ROWS),
    "logps of tiles": Call("linear_logps", _tiles, ("hidden", "bias")),
    "several depths": Call("linear_logps", _multi_token, (*HEAD, "other_hidden")),
    "logps of 16 bits": replace(PRIMITIVES["linear_logps"], dtype=torch.bfloat16),
    "divergence of a frozen head": replace(
        _with("linear_divergence", kind="forward_kl", budget=0), trained=("hidden",)
    ),
    **{kind: _with("linear_divergence", kind=kind) for kind in KINDS},
    "a list without a tail": _with("linear_topk_divergence", kind="reverse_kl", tail=False),
    "topk of a frozen head": replace(PRIMITIVES["linear_topk"], trained=("hidden",)),
    "sample_topk": Call("sample_topk", _sample, HEAD),
    "a mixture of each token": _with("mixed_linear_logps", per_token=True),
    "a KL in shards": _with("vocab_parallel_divergence", kind="reverse_kl"),
    "own tokens": _with("vocab_parallel_logps", own_tokens=True),
    "adapter": Call("fastpo", partial(_score, adapted=True), (*HEAD, "down", "up")),
}

"""Heads whose words are made tile by tile: the same numbers, and never the whole head."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _probes import Widest
from _tile_sources import SOURCES, H, Sliced, V
from test_linear_logps import BACKENDS, DIFFERENTIABLE, weights
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpo
from fastpo import reference
from fastpo.ops.shards.gathered import HeadOptions, score
from fastpo.ops.tiles.tiled import Tiled, tiled
from fastpo.ops.walks import forward as driver
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import assert_as_good_as_eager

N = 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOURCES)
def test_the_words(name, dtype):
    source, weight = SOURCES[name](dtype)
    head = tiled(source)
    for a, b in ((0, 2048), (0, 1), (5, 137), (127, 129), (V - 3, V), (7, 7)):
        assert torch.equal(head[a:b], weight[a:b])
    assert torch.equal(head[-3:], weight[-3:]) and torch.equal(head.whole(), weight)
    ids = torch.tensor([[V - 1, 0], [2047, 2048], [3, 3]])
    assert torch.equal(head[ids], weight[ids])
    assert torch.equal(head.index_select(0, ids[1]), weight[ids[1]])
    assert head.index_select(0, torch.tensor([-1, V])).isnan().all()
    means = (weight.to(kind).mean(0) for kind in (torch.float32, torch.float64))
    assert_as_good_as_eager("mean", head.mean(0, dtype=torch.float32), *means)


def test_words_that_nobody_asks_for_are_not_made():
    source, _ = SOURCES["sliced"](torch.float32)
    tiled(source).index_select(0, torch.tensor([3, 1]))
    assert source.asked == [(0, 2048)]


def problem(dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::5] = -100
    hidden = torch.randn(N, H, generator=g).to(dtype)
    offset = torch.randn(V, generator=g).to(dtype)
    return {"hidden": hidden, "labels": labels, "bias": offset if bias else None}


def run(function: Any, weight: Any, dtype: torch.dtype, names=DIFFERENTIABLE, **options: Any):
    """Statistics and gradients of hidden states and bias; `weight` is frozen."""
    given = problem(dtype)
    leaves = [given[name].requires_grad_() for name in ("hidden", "bias")]
    stats = function(weight=weight, **given, **options)
    return stats, torch.autograd.grad(weights(stats, names), leaves)


@pytest.mark.parametrize("names", [("logps",), DIFFERENTIABLE], ids=["logps", "all"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "torch") for name in SOURCES), *(("nvfp4", name) for name in BACKENDS)],
)
def test_matches_float64(name, backend, names):
    source, weight = SOURCES[name](torch.float32)
    options = {"outputs": OUTPUTS, "backend": backend}
    fused, grads = run(fastpo.linear_logps, source, torch.float32, names, **options)
    eager, eager_grads = run(reference.linear_logps, weight, torch.float32, names)
    truth, true_grads = run(reference.linear_logps, weight.double(), torch.float64, names)
    assert torch.equal(fused.is_top1, truth.is_top1)
    for field in set(OUTPUTS) - {"is_top1"}:
        given = (getattr(stats, field) for stats in (fused, eager, truth))
        assert_as_good_as_eager(field, *given)
    for x, *others in zip(grads, eager_grads, true_grads, strict=True):
        assert_as_good_as_eager("gradient", x, *others)


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_tiles_of_sixteen_bits(hidden):
    source, weight = SOURCES["float8_blocks"](torch.bfloat16)
    fused, grads = run(fastpo.linear_logps, source, hidden, outputs=OUTPUTS)
    dense, dense_grads = run(fastpo.linear_logps, weight, hidden, outputs=OUTPUTS)
    assert all(map(torch.equal, fused, dense)) and all(map(torch.equal, grads, dense_grads))


OTHER = torch.randn(V, H, generator=torch.Generator().manual_seed(2)) / 4


def _divergence(weight: Any, hidden: Tensor, teacher: bool, **given: Any) -> Tensor:
    other = hidden.detach()[:, :8].sin(), OTHER[:, :8]
    sides = (other, (hidden, weight)) if teacher else ((hidden, weight), other)
    rows = (x for side in sides for x in side)
    found = fastpo.linear_divergence(*rows, kind="jsd", teacher_grad=teacher).divergence
    assert found is not None
    return found


def _topk(weight: Any, hidden: Tensor, **given: Any) -> Tensor:
    return fastpo.linear_topk(hidden, weight, 3, bias=given["bias"]).values


def _listed(weight: Any, hidden: Tensor, **given: Any) -> Tensor:
    ids = torch.arange(N * 3).view(N, 3) * 37
    logps = torch.log_softmax(torch.linspace(0, 3, N * 3).view(N, 3), -1) - 0.1
    return fastpo.linear_topk_divergence(hidden, weight, ids, logps, kind="forward_kl")


def _mixed(weight: Any, hidden: Tensor, labels: Tensor, **given: Any) -> Tensor | None:
    hiddens, heads = [hidden, 0.5 * hidden], [weight, OTHER]
    return fastpo.mixed_linear_logps(hiddens, heads, [0.7, 0.3], labels).logps


def _adapted(weight: Any, hidden: Tensor, labels: Tensor, **given: Any) -> Tensor | None:
    up = OTHER[:, :2] * hidden.mean()  # its gradient is one of the hidden states' here
    options = HeadOptions(ignore_index=-100)
    operands = hidden, tiled(weight), None, labels, options
    return score(*operands, adapter=(hidden[:, :2], up)).logps


def _lse(weight: Any, hidden: Tensor, **given: Any) -> Tensor | None:
    return fastpo.linear_logps(hidden, weight, given["labels"], outputs=("lse",)).lse


CALLS: dict[str, Any] = {
    "logps": lambda weight, **given: fastpo.linear_logps(weight=weight, **given).logps,
    "lse": _lse,
    "adapted": _adapted,
    "topk": _topk,
    "listed": _listed,
    "student": lambda weight, **given: _divergence(weight, teacher=False, **given),
    "teacher": lambda weight, **given: _divergence(weight, teacher=True, **given),
    "mixed": _mixed,
}


def values(call: Any, weight: Any) -> list[Tensor]:
    given = problem(bias=False)
    hidden = given["hidden"].requires_grad_()
    found = call(weight, **given)
    factors = torch.linspace(-1, 1, found.numel()).view(found.shape)
    return [found, *torch.autograd.grad((found * factors).sum(), hidden)]


class Memory(Widest):
    """Of tensors that are there; also those inside of operators, which a mode sees from outside."""

    def __init__(self, monkeypatch: Any) -> None:
        super().__init__()
        for name in ("forward", "backward"):
            monkeypatch.setattr(driver, name, partial(self.inside, getattr(driver, name)))

    def inside(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        with self:
            return run(*args, **kwargs)

    def counts(self, x: Tensor) -> bool:
        return not isinstance(x, Tiled)


@pytest.mark.parametrize("name", CALLS)
def test_every_primitive_without_the_whole_head(name, monkeypatch):
    _, weight = SOURCES["sliced"](torch.float32)
    source, expected = Sliced(weight), values(CALLS[name], weight)
    with Memory(monkeypatch) as watch:
        found = values(CALLS[name], source)
    torch.testing.assert_close(found, expected)
    assert all(b - a <= 2048 for a, b in source.asked)
    assert 2048 * H <= watch.elements < V * H


def test_the_watch_sees_a_whole_head(monkeypatch):
    source, _ = SOURCES["nvfp4"](torch.float32)
    with Memory(monkeypatch) as watch:
        tiled(source).whole()
    assert watch.elements == V * H


def test_a_shard_of_words(mesh):
    source, weight = SOURCES["nvfp4"](torch.float32)
    place = {"first": 0, "vocab": V}
    found, dense = (
        values(lambda w, **given: fastpo.vocab_parallel_logps(weight=w, **place, **given).logps, x)
        for x in (source, weight)
    )
    assert all(map(torch.equal, found, dense))


def test_checkpointed_and_offloaded():
    source, _ = SOURCES["float8_blocks"](torch.float32)
    plain = values(CALLS["logps"], source)

    def again(weight: Any, hidden: Tensor, **given: Any) -> Any:
        inner = lambda h: CALLS["logps"](weight, hidden=h, **given)  # noqa: E731
        return checkpoint(inner, hidden, use_reentrant=False)

    with torch.autograd.graph.save_on_cpu():
        offloaded = values(CALLS["logps"], source)
    for found in (values(again, source), offloaded):
        assert all(map(torch.equal, found, plain))


def described(**changes: Any) -> Any:
    """A source of 40 words, with something about it changed or, where None, missing."""
    own = Sliced(torch.randn(40, H))
    facts = {"shape": own.shape, "dtype": own.dtype, "device": own.device, "tile": own.tile}
    return SimpleNamespace(**{k: v for k, v in (facts | changes).items() if v is not None})


WRONG = {
    "weight: expected a tile source with shape, dtype and device, got .* without shape": {
        "shape": None
    },
    "got SimpleNamespace without device": {"device": None},
    r"weight: expected a tensor, got namespace\(shape": {"tile": None},
    r"weight.shape: expected \(V, H\), got \(40,\)": {"shape": (40,)},
    r"weight.shape: expected \(V, H\), got \(0, 48\)": {"shape": (0, H)},
    "weight.dtype: expected float32, bfloat16 or float16, got torch.int8": {"dtype": torch.int8},
    "weight: expected a tile source without gradient, got requires_grad=True": {
        "requires_grad": True
    },
    r"weight: expected shape \(V, 48\), got \(40, 9\)": {"shape": (40, 9)},
    "weight: expected device cpu, got meta": {"device": "meta"},
    r"weight.tile\(0, 40\): expected shape \(40, 48\), got \(39, 48\)": {
        "tile": lambda a, b: torch.zeros(b - a - 1, H)
    },
    r"weight.tile\(0, 40\): expected dtype torch.float32, got torch.float64": {
        "tile": lambda a, b: torch.zeros(b - a, H).double()
    },
    r"weight.tile\(0, 40\): expected device cpu, got meta": {
        "tile": lambda a, b: torch.zeros(b - a, H, device="meta")
    },
    r"weight.tile\(0, 40\): expected a tensor, got None": {"tile": lambda a, b: None},
}


@pytest.mark.parametrize("match", WRONG)
def test_errors(match):
    with pytest.raises(ValueError, match=match):
        fastpo.linear_logps(torch.randn(3, H), described(**WRONG[match]), torch.arange(3))


def test_what_asks_for_more_than_tiles_is_an_error():
    head = tiled(SOURCES["sliced"](torch.float32)[0])
    asked = (head.double, lambda: head @ torch.ones(H), lambda: head[:, :3], lambda: head[::2])
    for ask in (*asked, lambda: head[1:2050], lambda: head.mean(1), lambda: head[head > 0]):
        with pytest.raises(RuntimeError, match=r"^weight: expected "):
            ask()
    head.requires_grad_()
    with pytest.raises(ValueError, match="a tile source without gradient"):
        fastpo.linear_logps(torch.randn(3, H), head, torch.arange(3))


def packed(stored: Tensor, **changes: Any) -> fastpo.PackedIntegers:
    facts = {"scales": torch.ones(40, 3), "bits": 4, "hidden": H, **changes}
    return fastpo.PackedIntegers(stored.to(torch.int32), **facts)


def scaled(stored: Any = None, scales: Any = None, block: Any = (1, H)) -> fastpo.BlockScaled:
    stored = torch.zeros(40, H, dtype=torch.int8) if stored is None else stored
    return fastpo.BlockScaled(stored, torch.ones(40, 1) if scales is None else scales, block)


def fours(scales: Tensor | None = None, scale: Any = 1.0) -> fastpo.NVFP4:
    stored = torch.zeros(40, H // 2, dtype=torch.uint8)
    return fastpo.NVFP4(stored, torch.ones(40, H // 16) if scales is None else scales, scale)


BYTES = torch.ones(40, H // 16, dtype=torch.uint8)
BLOCK = r"block: expected \(rows, columns\), two integers >= 1, got "
FORMATS: dict[str, Any] = {
    "stored: expected dtype int8 or float8, got torch.uint8": lambda: scaled(
        torch.zeros(40, H, dtype=torch.uint8)
    ),
    "stored: expected dtype int8 or float8, got torch.bool": lambda: scaled(torch.ones(40, H) > 0),
    "stored: expected dtype int8 or float8, got torch.complex64": lambda: scaled(
        torch.zeros(40, H, dtype=torch.complex64)
    ),
    "scales: expected dtype a floating one, got torch.uint8": lambda: scaled(
        scales=torch.ones(40, 1, dtype=torch.uint8)
    ),
    "scales: expected device cpu, got meta": lambda: scaled(scales=torch.ones(40, 1).to("meta")),
    BLOCK + r"\(0, 48\)": lambda: scaled(block=(0, H)),
    BLOCK + r"\(1,\)": lambda: scaled(block=(1,)),
    BLOCK + "128": lambda: scaled(block=128),
    BLOCK + "None": lambda: scaled(block=None),
    BLOCK + r"\(1, True\)": lambda: scaled(block=(1, True)),
    BLOCK + r"\(10.0, 32.0\)": lambda: scaled(block=(10.0, 32.0)),
    "scales: expected dtype one of float8_e4m3fn, float32, .*, got torch.uint8": lambda: fours(
        BYTES
    ),
    r"scale: expected .* tensor of one, got torch.float32 of shape \(3,\)": lambda: fours(
        scale=torch.ones(H // 16)
    ),
    "scale: expected .* floating-point tensor of one, got torch.int64": lambda: fours(
        scale=torch.tensor(1)
    ),
    "scale: expected device cpu, got meta": lambda: fours(scale=torch.ones(1, device="meta")),
    "scale: expected a finite number or a tensor of one, got None": lambda: fours(scale=None),
    r"scales: expected shape \(40, G\), got \(40, 0\)": lambda: packed(
        torch.zeros(40, 6), scales=torch.ones(40, 0)
    ),
    "scales: expected dtype a floating one, got torch.int64": lambda: packed(
        torch.zeros(40, 6), scales=torch.ones(40, 3).long()
    ),
    "zero_points: expected device cpu, got meta": lambda: packed(
        torch.zeros(40, 6), zero_points=torch.ones(40, 3, device="meta")
    ),
    r"scales: expected shape \(2, 2\), got \(3, 2\)": lambda: fastpo.BlockScaled(
        torch.zeros(40, H, dtype=torch.int8), torch.ones(3, 2), (32, 32)
    ),
    r"stored: expected shape \(V, H\), got \(40,\)": lambda: fastpo.BlockScaled(
        torch.zeros(40), torch.ones(3, 2), (32, 32)
    ),
    "dtype: expected float32, bfloat16 or float16, got torch.float64": lambda: fastpo.BlockScaled(
        torch.zeros(40, H), torch.ones(1, 1), (32, 32), torch.float64
    ),
    "stored: expected dtype torch.uint8, got torch.int8": lambda: fastpo.NVFP4(
        torch.zeros(40, 24, dtype=torch.int8), torch.ones(40, 3), 1.0
    ),
    r"scales: expected shape \(40, 3\), got \(40, 2\)": lambda: fastpo.NVFP4(
        torch.zeros(40, 24, dtype=torch.uint8), torch.ones(40, 2), 1.0
    ),
    r"stored: expected shape \(40, 6\), got \(40, 5\)": lambda: packed(torch.zeros(40, 5)),
    "stored: expected dtype torch.int32, got torch.int64": lambda: fastpo.PackedIntegers(
        torch.zeros(40, 6, dtype=torch.int64), torch.ones(40, 3), 4, H
    ),
    "bits: expected 2, 4 or 8, got 3": lambda: packed(torch.zeros(40, 6), bits=3),
    r"scales: expected shape \(40, G\), got \(39, 3\)": lambda: packed(
        torch.zeros(40, 6), scales=torch.ones(39, 3)
    ),
    r"zero_points: expected shape \(40, 3\), got \(40, 2\)": lambda: packed(
        torch.zeros(40, 6), zero_points=torch.ones(40, 2)
    ),
    "layer: expected a linear layer quantised by bitsandbytes or torchao": lambda: (
        fastpo.tile_source(torch.nn.Linear(3, 4))
    ),
    "dtype: expected float32, bfloat16, float16 or None, got torch.int8": lambda: (
        fastpo.tile_source(torch.nn.Linear(3, 4), torch.int8)
    ),
}


@pytest.mark.parametrize("primitive", ["logps", "divergence"])
def test_no_compiler_traces_a_walk(primitive):
    """Nor does an operator of a graph get words that are not there."""
    source, _ = SOURCES["float8_blocks"](torch.float32)
    traces: list[str] = []

    def watching(graph, _):
        traces.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph

    def loss(hidden, labels):
        if primitive == "logps":
            return fastpo.linear_logps(hidden * 2, source, labels).logps.sum()
        other = hidden.detach()
        found = fastpo.linear_divergence(hidden * 2, source, other, source, kind="jsd")
        return found.divergence.sum()

    results = []
    for function in (loss, torch.compile(loss, backend=watching)):
        given = problem()
        value = function(given["hidden"].requires_grad_(), given["labels"])
        results.append((value, *torch.autograd.grad(value, given["hidden"])))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert traces and not any("walks/head.py" in trace for trace in traces)


@pytest.mark.parametrize("match", FORMATS)
def test_errors_of_formats(match):
    with pytest.raises(ValueError, match=match):
        FORMATS[match]()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_scale_of_any_shape(shape):
    """As checkpoints have it."""
    source, weight = SOURCES["nvfp4"](torch.float32)
    found = fastpo.NVFP4(source.stored, source.scales, source.scale.view(shape), torch.float32)
    assert torch.equal(tiled(found).whole(), weight)


def test_scales_that_are_exponents():
    """float8_e8m0fnu, as MX formats and later DeepSeek models have them."""
    source, _ = SOURCES["float8_blocks"](torch.float32)
    powers = 2.0 ** torch.arange(-20, 20).view(20, 2)
    made = (
        fastpo.BlockScaled(source.stored, scales, (128, 32), torch.float32)
        for scales in (powers, powers.to(torch.float8_e8m0fnu))
    )
    assert torch.equal(*(tiled(x).whole() for x in made))

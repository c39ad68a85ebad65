"""`multi_head_logps`: each token under its own head, judged against float64."""

from __future__ import annotations

import pytest
import torch
from _draws import assert_draws
from _probes import Widest
from test_linear_logps import BACKENDS, DEVICE, DIFFERENTIABLE, OPTIONS, weights
from torch import Tensor

import fastpo
from fastpo import planner, reference
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import make_head

# The anchored ones have bounds of their own for statistics, in test_linear_logps.py.
CLASSIC = [name for name in BACKENDS if name not in ("anchored", "cutlass")]
BOTH = {"names": ("logps", "lse"), "outputs": ("logps", "lse")}


def make_heads(tokens: int, vocab: int, hidden: int, heads: int, *, dtype=torch.float32, seed=0):
    """hidden, weight [K, V, H], bias [K, V]; labels with ignored rows; the head of each token."""
    parts = [
        make_head(tokens, vocab, hidden, dtype=dtype, bias=True, seed=10 * seed + i)
        for i in range(heads)
    ]
    labels = parts[0].labels
    labels[::4] = -100
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, heads, (tokens,), generator=g)
    tensors = [
        parts[0].hidden,
        torch.stack([x.weight for x in parts]),
        torch.stack([x.bias for x in parts if x.bias is not None]),
    ]
    return [x.to(DEVICE) for x in tensors], labels.to(DEVICE), chosen


def run(function, tensors: list[Tensor], dtype, labels, heads, names=DIFFERENTIABLE, **options):
    hidden, weight, bias = leaves = [x.to(dtype).clone().requires_grad_() for x in tensors]
    stats = function(hidden, weight, labels, heads, bias=bias, **options)
    return stats, torch.autograd.grad(weights(stats, names), leaves)


def named(stats: fastpo.TokenStats, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return stats._asdict() | dict(zip(("dhidden", "dweight", "dbias"), grads, strict=True))


def check(*shape, dtype=torch.float32, draws=4, names=DIFFERENTIABLE, options=None, **own):
    options, results = options or {}, []
    for seed in range(draws):
        problem = make_heads(*shape, dtype=dtype, seed=seed)
        (tensors, labels, heads), slow = problem, reference.multi_head_logps
        given = {**options, **own, "outputs": OUTPUTS}
        fused = run(fastpo.multi_head_logps, tensors, dtype, labels, heads, names, **given)
        assert all(grad.dtype == dtype for grad in fused[1])
        eager = run(slow, tensors, dtype, labels, heads, names, **options)
        truth = run(slow, tensors, torch.float64, labels, heads, names, **options)
        results.append([named(*x) for x in (fused, eager, truth)])
        if dtype != torch.float32:
            results[-1][0].pop("is_top1")
    assert_draws(results)


@pytest.mark.parametrize("options", OPTIONS, ids=list(OPTIONS))
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("backend", CLASSIC)
def test_matches_float64(backend, budget, options):
    check(29, 503, 24, 3, backend=backend, budget=budget, options=OPTIONS[options])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs(dtype):
    check(40, 1025, 48, 2, dtype=dtype, draws=1, names=("logps",))


# tokens, vocabulary, hidden, heads
@pytest.mark.parametrize("shape", [(0, 5, 8, 2), (1, 1, 1, 1), (1, 2, 3, 4), (9, 70, 16, 1)])
def test_shapes(shape):
    check(*shape, draws=8)


def test_a_head_without_tokens_has_no_gradient():
    tensors, labels, _ = make_heads(6, 50, 8, 3)
    heads = torch.tensor([2, 0, 0, 2, 2, 0])
    stats, grads = run(fastpo.multi_head_logps, tensors, torch.float32, labels, heads, **BOTH)
    assert not grads[1][1].any() and grads[1][0].any() and grads[1][2].any()
    assert stats.entropy is None


def test_each_row_is_its_own_heads_row():
    (hidden, weight, bias), labels, heads = make_heads(12, 90, 8, 3)
    stats = fastpo.multi_head_logps(
        hidden.view(3, 4, 8), weight, labels.view(3, 4), heads.view(3, 4), bias=bias
    )
    assert stats.logps.shape == (3, 4)
    for row in range(12):
        head = int(heads[row])
        alone = fastpo.linear_logps(hidden[row], weight[head], labels[row], bias=bias[head])
        torch.testing.assert_close(stats.logps.view(-1)[row], alone.logps)


def test_every_row_is_scored_where_no_label_is_ignored():
    (hidden, weight, bias), labels, heads = make_heads(12, 90, 8, 3)
    given = hidden, weight, labels.clamp_min(0), heads
    found = fastpo.multi_head_logps(*given, bias=bias, ignore_index=None).logps
    assert torch.equal(found, fastpo.multi_head_logps(*given, bias=bias).logps)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 90\), got -100"):
        fastpo.multi_head_logps(hidden, weight, labels, heads, bias=bias, ignore_index=None)


def test_heads_may_be_on_the_device():
    tensors, labels, heads = make_heads(12, 90, 8, 3)
    results = [
        run(fastpo.multi_head_logps, tensors, torch.float32, labels, x, **BOTH)
        for x in (heads, heads.to(DEVICE))
    ]
    assert torch.equal(results[0][0].logps, results[1][0].logps)


def test_bad_hidden_state_gives_nan_in_its_row_only():
    (hidden, weight, bias), labels, heads = make_heads(6, 90, 8, 2)
    hidden[2, 3] = float("nan")
    stats = fastpo.multi_head_logps(hidden, weight, labels, heads, bias=bias)
    assert stats.logps.isnan().tolist() == [row == 2 for row in range(6)]


def test_no_tensor_of_tokens_times_words(monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(32, 256))
    tensors, labels, heads = make_heads(128, 2000, 4, 2)
    with Widest() as widest:
        run(fastpo.multi_head_logps, tensors, torch.float32, labels, heads, budget=0, **BOTH)
    assert widest.elements <= 2 * 2000 * 4


ROWS = torch.zeros(3, dtype=torch.int64)
ERRORS = [
    ({"weight": torch.zeros(10, 4)}, r"weight: expected shape \(K, V, 4\), got \(10, 4\)"),
    ({"weight": torch.zeros(0, 10, 4)}, r"weight: expected shape \(K, V, 4\), got \(0, 10, 4\)"),
    ({"hidden": torch.tensor(0.0)}, r"hidden: expected shape \(\.\.\., H\), got \(\)"),
    ({"heads": ROWS[:2]}, r"heads: expected shape \(3,\), got \(2,\)"),
    ({"heads": ROWS.int()}, r"heads: expected dtype torch.int64, got torch.int32"),
    ({"heads": ROWS + 2}, r"heads: expected values in \[0, 2\), got 2 at row 0"),
    ({"heads": ROWS - 1}, r"heads: expected values in \[0, 2\), got -1 at row 0"),
    ({"heads": ROWS.to("meta")}, r"heads: expected device cpu or cpu, got meta"),
    ({"labels": ROWS[:2]}, r"labels: expected shape \(3,\), got \(2,\)"),
    ({"labels": ROWS.to("meta")}, r"labels: expected device cpu, got meta"),
    ({"labels": ROWS + 10}, r"labels: expected values in \[0, 10\).*, got 10 at row 0"),
    (
        {"labels": torch.tensor([0, 10, 0]), "heads": torch.tensor([1, 1, 0])},
        r"labels: expected values in .*, got 10 at row 1",
    ),
    ({"labels": ROWS.int()}, "labels: expected dtype torch.int64"),
    ({"weight": torch.zeros(0, 10, 4)}, r"weight: expected shape \(K, V, 4\), got \(0, 10, 4\)"),
    ({"bias": torch.zeros(10)}, r"bias: expected shape \(2, 10\), got \(10,\)"),
    ({"temperature": -1.0}, r"temperature: expected a finite number > 0, got -1.0"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_value_errors(changes, message):
    given = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(2, 10, 4),
        "labels": ROWS,
        "heads": ROWS,
    }
    with pytest.raises(ValueError, match=message):
        fastpo.multi_head_logps(**(given | changes))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_waits_for_no_device_value_with_heads_on_the_host():
    tensors, labels, heads = make_heads(64, 1000, 32, 3)
    run(fastpo.multi_head_logps, tensors, torch.bfloat16, labels, heads, **BOTH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fastpo.multi_head_logps, tensors, torch.bfloat16, labels, heads, **BOTH)
    finally:
        torch.cuda.set_sync_debug_mode("default")

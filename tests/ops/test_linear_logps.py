"""`linear_logps` end to end on every backend and in every mode, judged against float64."""

from __future__ import annotations

import pytest
import torch
from _probes import COMPARING
from torch import Tensor

import fastpo
from fastpo import reference
from fastpo.ops.rows import registry
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    name for name in registry.BACKENDS if registry.unavailable(name, torch.device(DEVICE)) is None
]
DIFFERENTIABLE = ("logps", "entropy", "lse")
INTERPRETED = ("triton", "anchored") if DEVICE == "cpu" else ()

# name -> (train_head, budget as a share of all probabilities)
MODES = {"score": None, "frozen": None, "keep": 1.0, "lean": 0.0, "mixed": 0.4}
OPTIONS = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scale": 1.3},
    "softcap": {"softcap": 5.0},
    "all": {"softcap": 30.0, "temperature": 1.6, "logit_scale": -0.8},
}


def weights(stats: fastpo.TokenStats, names: tuple[str, ...], seed: int = 1) -> Tensor:
    """A loss that sends a different gradient into every row of every differentiable output."""
    device = stats.lse.device  # drawn there: a copy from the host would wait
    g = torch.Generator(device).manual_seed(seed)
    total = 0
    for name in DIFFERENTIABLE:
        factor = torch.randn(stats.lse.shape, generator=g, device=device).to(stats.lse)
        if name in names:
            total = total + (getattr(stats, name) * factor).sum()
    return total


def budget_of(mode: str, inputs: HeadInputs) -> int:
    share = MODES[mode] or 0.0
    cells = inputs.labels.numel() * inputs.weight.shape[0]
    return int(share * cells * inputs.hidden.element_size())


def run(inputs: HeadInputs, backend: str, mode: str, grads: tuple[str, ...], **options):
    """Statistics and gradients of the fused head."""
    if mode == "score":
        inputs = inputs.like(inputs.hidden.dtype, grad=False)
    if mode == "frozen":
        inputs.weight.requires_grad_(False)
        if inputs.bias is not None:
            inputs.bias.requires_grad_(False)
    stats = fastpo.linear_logps(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        bias=inputs.bias,
        outputs=OUTPUTS,
        budget=budget_of(mode, inputs),
        backend=backend,
        **options,
    )
    leaves = inputs.leaves()
    found = torch.autograd.grad(weights(stats, grads), list(leaves.values())) if leaves else ()
    return stats, dict(zip(leaves, found, strict=True))


def run_reference(inputs: HeadInputs, grads: tuple[str, ...], **options):
    stats = reference.linear_logps(
        inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, **options
    )
    leaves = inputs.leaves()
    found = torch.autograd.grad(weights(stats, grads), list(leaves.values()))
    return stats, dict(zip(leaves, found, strict=True))


def check(inputs: HeadInputs, backend: str, mode: str, dtype, grads=("logps",), **options):
    truth, truth_grads = run_reference(inputs.like(torch.float64), grads, **options)
    eager, eager_grads = run_reference(inputs.like(dtype), grads, **options)
    fused, fused_grads = run(inputs.like(dtype), backend, mode, grads, **options)
    for name in OUTPUTS:
        value = getattr(fused, name)
        if name == "is_top1":
            assert value.dtype == torch.bool
            if dtype == torch.float32:
                assert torch.equal(value, truth.is_top1)
        else:
            assert value.dtype == torch.float32
            slack = 0.0
            if backend in ("anchored", "cutlass") and name not in ("logps", "lse"):
                # Sums beside the label: what they cancel is as large as its distance.
                slack = rounding(truth.logps, torch.float32)
            others = getattr(eager, name), getattr(truth, name)
            assert_as_good_as_eager(name, value, *others, slack=slack)
    for name, value in fused_grads.items():
        assert value.dtype == dtype
        slack = 0.0
        if backend in ("anchored", "cutlass") and dtype == torch.float32:
            # Exponentials and their scales meet in the product, each with a rounding of its own.
            slack = 2 * rounding(truth_grads[name], dtype)
        assert_as_good_as_eager(name, value, eager_grads[name], truth_grads[name], slack=slack)


@pytest.mark.parametrize("options", OPTIONS, ids=list(OPTIONS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, mode, options):
    inputs = make_head(23, 1003, 32, bias=True, ignored=0.3, device=DEVICE)
    check(inputs, backend, mode, torch.float32, DIFFERENTIABLE, **OPTIONS[options])


def dtypes_of(backend: str) -> list[torch.dtype]:
    # bf16 is wrong in Triton's interpreter itself.
    return [torch.float16] if backend in INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "lean"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b in BACKENDS for d in dtypes_of(b)], ids=str
)
def test_sixteen_bit_inputs(backend, dtype, mode):
    inputs = make_head(40, 2049, 48, device=DEVICE, dtype=dtype)
    check(inputs, backend, mode, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_of_sixteen_bit_inputs_are_float32_exact(backend):
    dtype = dtypes_of(backend)[-1]
    inputs = make_head(64, 5000, 64, dtype=dtype, device=DEVICE, peak=20.0)
    truth = reference.linear_logps(
        inputs.hidden.double(), inputs.weight.double(), inputs.labels
    ).logps
    logps = fastpo.linear_logps(inputs.hidden, inputs.weight, inputs.labels, backend=backend).logps
    assert ((logps - truth).abs() <= 2e-4 * (1 + truth.abs())).all()


SHAPES = [(0, 5, 8), (1, 1, 1), (1, 2, 3), (5, 70, 16), (3, 4097, 7), (10, 8193, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, mode, shape):
    inputs = make_head(*shape, device=DEVICE)
    if shape[0]:
        inputs.labels[-1] = shape[1] - 1
    check(inputs, backend, mode, torch.float32)


@pytest.mark.parametrize(
    ("options", "output"), [*((x, "logps") for x in OPTIONS), ("all", "entropy"), ("all", "lse")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_head_of_one_output_alone(backend, options, output, monkeypatch):
    """The gradient of log-probabilities is made in the forward, of the scored rows."""
    monkeypatch.setattr("fastpo.planner.tile_shape", lambda *_: fastpo.planner.Tiles(16, 64))
    inputs = make_head(36, 150, 24, bias=True, ignored=0.3, seed=1, device=DEVICE)
    check(inputs, backend, "frozen", torch.float32, (output,), **OPTIONS[options])


@pytest.mark.parametrize("mode", ["frozen", "keep", "mixed"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in BACKENDS for d in (torch.float32, *dtypes_of(b))],
    ids=str,
)
def test_several_token_blocks_and_vocabulary_tiles(backend, dtype, mode, monkeypatch):
    monkeypatch.setattr("fastpo.planner.tile_shape", lambda *_: fastpo.planner.Tiles(16, 64))
    inputs = make_head(36, 150, 24, bias=True, ignored=0.2, device=DEVICE)
    check(inputs, backend, mode, dtype, DIFFERENTIABLE, softcap=12.0)


@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored(backend, mode):
    inputs = make_head(6, 50, 8, device=DEVICE)
    inputs.labels.fill_(-100)
    stats, grads = run(inputs.like(torch.float32), backend, mode, DIFFERENTIABLE)
    for name in OUTPUTS:
        assert not getattr(stats, name).any(), name
    for name, grad in grads.items():
        assert not grad.any(), name


@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend, mode):
    inputs = make_head(9, 130, 8, device=DEVICE).like(torch.float32)
    inputs.labels[4] = -100
    with torch.no_grad():
        inputs.hidden[4] = float("nan")
    stats, grads = run(inputs, backend, mode, DIFFERENTIABLE)
    assert stats.logps.isfinite().all() and stats.logps[4] == 0
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["dhidden"][4].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_hidden_state_gives_nan_in_its_row_only(backend, bad):
    inputs = make_head(5, 90, 8, device=DEVICE).like(torch.float32)
    with torch.no_grad():
        inputs.hidden[2, 3] = bad
    stats, grads = run(inputs, backend, "frozen", ("logps",))
    assert stats.logps.isnan().tolist() == [False, False, True, False, False]
    assert grads["dhidden"].isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_minus_infinity_removes_a_word(backend, monkeypatch):
    inputs = make_head(7, 60, 8, bias=True, device=DEVICE)
    inputs.labels.clamp_(20, 50)
    inputs.bias[:20] = inputs.bias[55:] = float("-inf")
    some = slice(20, 55)
    left = HeadInputs(inputs.hidden, inputs.weight[some], inputs.labels - 20, inputs.bias[some])
    monkeypatch.setattr("fastpo.planner.tile_shape", lambda *_: fastpo.planner.Tiles(4, 8))
    for mode in ("keep", "lean", "frozen"):
        stats, grads = run(inputs.like(torch.float32), backend, mode, DIFFERENTIABLE)
        truth, truth_grads = run_reference(left.like(torch.float64), DIFFERENTIABLE)
        for name in DIFFERENTIABLE:
            value, true = getattr(stats, name).double(), getattr(truth, name)
            torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            grads["dhidden"].double(), truth_grads["dhidden"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_a_bias_of_minus_infinity_removes(backend, mode):
    """Its log-probability is -inf; its gradient is that of eager, and a number."""
    inputs = make_head(7, 60, 8, bias=True, device=DEVICE)
    inputs.bias[20:] = float("-inf")
    inputs.labels[2] = 40
    stats, grads = run(inputs.like(torch.float32), backend, mode, ("logps",))
    truth, truth_grads = run_reference(inputs.like(torch.float64), ("logps",))
    assert stats.logps.isneginf()[2] and truth.logps.isneginf()[2]
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), truth_grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_with_an_earlier_word_is_not_top1(backend):
    beside = backend in ("anchored", "cutlass")
    dtype = torch.bfloat16 if beside and DEVICE == "cuda" else torch.float32
    hidden = torch.ones(3, 1, device=DEVICE, dtype=dtype)
    weight = torch.zeros(200, 1, device=DEVICE, dtype=dtype)
    weight[[20, 150]] = 1.0
    labels = torch.tensor([20, 150, 3], device=DEVICE)
    stats = fastpo.linear_logps(hidden, weight, labels, outputs=("is_top1",), backend=backend)
    # Beside the label a tie is exp(0) = 1: no word above it.
    assert stats.is_top1.tolist() == [True, beside, False]
    assert stats.logps is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_with_and_without_gradient(backend):
    inputs = make_head(30, 1500, 40, device=DEVICE)
    results = [
        run(inputs.like(torch.float32), backend, mode, ("logps",))[0].logps for mode in MODES
    ]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend):
    inputs = make_head(30, 1500, 40, device=DEVICE)
    first, second = (run(inputs.like(torch.float32), backend, "mixed", ("logps",)) for _ in "ab")
    assert torch.equal(first[0].logps, second[0].logps)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_leading_dimensions_and_partial_gradients():
    hidden = torch.randn(2, 3, 8, device=DEVICE)
    weight = torch.randn(40, 8, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 40, (2, 3), device=DEVICE)
    stats = fastpo.linear_logps(hidden, weight, labels)
    assert stats.logps.shape == (2, 3)
    (dweight,) = torch.autograd.grad(stats.logps.sum(), weight)
    truth = weight.detach().double().requires_grad_()
    loss = reference.linear_logps(hidden.double(), truth, labels).logps.sum()
    torch.testing.assert_close(
        dweight.double(), torch.autograd.grad(loss, truth)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
def test_autocast_with_float32_weights(mode):
    inputs = make_head(20, 700, 32, device=DEVICE)
    truth, truth_grads = run_reference(inputs.like(torch.float64), ("logps",))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        eager, eager_grads = run_reference(inputs.like(torch.float32), ("logps",))
        fused, fused_grads = run(inputs.like(torch.float32), BACKENDS[-1], mode, ("logps",))
    assert_as_good_as_eager("logps", fused.logps, eager.logps, truth.logps)
    for name, grad in fused_grads.items():
        assert grad.dtype == torch.float32
        assert_as_good_as_eager(name, grad, eager_grads[name], truth_grads[name])


def test_entropy_that_is_only_logged_costs_a_frozen_head_no_recomputation(monkeypatch):
    inputs = make_head(10, 200, 16, device=DEVICE).like(torch.float32)
    inputs.weight.requires_grad_(False)
    stats = fastpo.linear_logps(
        inputs.hidden, inputs.weight, inputs.labels, outputs=("logps", "entropy")
    )

    def refuse(*_):
        raise AssertionError("the backward recomputed logits")

    monkeypatch.setattr("fastpo.ops.walks.backward.BackwardWalk.__init__", refuse)
    stats.logps.sum().backward()
    assert inputs.hidden.grad.isfinite().all()


@pytest.mark.parametrize(("turned", "dynamic"), [(False, None), (True, None), (False, True)])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in INTERPRETED])
def test_compiles_into_one_graph(backend, turned, dynamic):
    """Columns of hidden and weight may be far apart, and all sizes unknown."""

    def loss(hidden, weight, labels):
        stats = fastpo.linear_logps(
            hidden * 2, weight, labels, outputs=("logps", "entropy"), backend=backend
        )
        return (stats.logps * 0.5).sum() - 0.1 * stats.entropy.sum()

    inputs = make_head(16, 300, 8, device=DEVICE, ignored=0.2)
    results = []
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=COMPARING)
    for function in (loss, compiled):
        leaves = [x.detach().t() if turned else x.detach() for x in (inputs.hidden, inputs.weight)]
        leaves = [x.contiguous().requires_grad_() for x in leaves]
        value = function(*(x.t() if turned else x for x in leaves), inputs.labels)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_operator_registration():
    x = make_head(6, 50, 8, device=DEVICE).like(torch.float32)
    arguments = (
        x.hidden, x.weight, None, x.labels, None, 1.0, None, 1.0, -100, "logps,entropy",
        torch.float32, "torch", True, True, None, True,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastpo.linear_logps.default, arguments, test_utils=checks)


def test_a_changed_weight_is_noticed():
    x = make_head(4, 30, 8, device=DEVICE).like(torch.float32)
    stats = fastpo.linear_logps(x.hidden, x.weight, x.labels)
    with torch.no_grad():
        x.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logps.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_waits_for_no_device_value(backend, mode):
    inputs = make_head(64, 1000, 32, device=DEVICE, dtype=torch.bfloat16, ignored=0.2)
    run(inputs.like(torch.bfloat16), backend, mode, ("logps",))  # compile outside the guard
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs.like(torch.bfloat16), backend, mode, ("logps",))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_outside_the_vocabulary_poisons_its_row_on_a_gpu(backend):
    inputs = make_head(4, 30, 8, device=DEVICE).like(torch.float32)
    inputs.labels[1] = 30
    stats, grads = run(inputs, backend, "frozen", ("logps",))
    assert stats.logps.isnan().tolist() == [False, True, False, False]
    assert grads["dhidden"].isnan().all(1).tolist() == [False, True, False, False]

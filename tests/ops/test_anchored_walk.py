"""The walk around the anchored product: what it launches, keeps, lends and multiplies."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from _cutlass import stand_in
from _draws import assert_draws
from _triton import MARKS

import fastpo
from fastpo import planner, reference
from fastpo.ops.rows import anchored_cutlass
from fastpo.ops.rows import triton as rows_triton
from fastpo.ops.walks import head as walk
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head, rounding

pytest.importorskip("triton")

from fastpo.kernels import anchored, anchored_again, anchored_fold, anchored_label, anchored_target

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="float32 products are for the CPU"),
    *MARKS,
]
N, V, H = 24, 700, 16
# name -> tokens kept; more than all of them is no bound
MODES = {"frozen": 0, "keep": N, "lean": 0, "mixed": 10}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows, of E and of what is computed again."""
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(16, 128))
    monkeypatch.setattr(planner, "frozen_rows", lambda *_: 7)
    monkeypatch.setattr(planner, "exponential_words", lambda _: 256)
    monkeypatch.setattr(planner, "recomputed_words", lambda *_: 256)


def problem() -> HeadInputs:
    inputs = make_head(N, V, H, bias=True, ignored=0.2)
    inputs.labels[3] = 2
    inputs.bias[2] -= 70.0  # far below the others: computed again
    return inputs


def run(
    inputs: HeadInputs, mode: str, grads: tuple[str, ...], backend: str | None = "anchored"
) -> dict:
    """backend None: the reference."""
    if mode == "frozen":
        inputs.weight.requires_grad_(False), inputs.bias.requires_grad_(False)
    operands, given = (inputs.hidden, inputs.weight, inputs.labels), {"temperature": 0.9}
    if backend is not None:
        budget = MODES[mode] * planner.exponential_words(V) * -(-V // planner.exponential_words(V))
        stats = fastpo.linear_logps(
            *operands, bias=inputs.bias, **given, outputs=("logps", *grads), budget=4 * budget,
            backend=backend,
        )  # fmt: skip
    else:
        stats = reference.linear_logps(*operands, bias=inputs.bias, **given)
    factor = torch.linspace(-1, 1, N).to(stats.logps)
    loss = sum((getattr(stats, name) * factor.roll(i)).sum() for i, name in enumerate(grads))
    leaves = inputs.leaves()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.fixture
def on_cutlass(monkeypatch) -> list:
    """Its product in plain PyTorch, of float32 operands however they lie."""
    monkeypatch.setattr(anchored_cutlass, "unavailable", lambda device: None)
    monkeypatch.setattr(anchored_cutlass, "serves", lambda *operands: True)
    return stand_in(monkeypatch, torch.float32)


@pytest.mark.parametrize("grads", [("logps",), ("lse",), ("logps", "entropy", "lse")], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["anchored", "cutlass"])
def test_gradients_over_several_blocks(small_blocks, on_cutlass, backend, mode, grads):
    """By what was stored alone where it suffices, else by the row kernels from the same."""
    truth = run(problem().like(torch.float64), mode, grads, backend=None)
    eager = run(problem().like(torch.float32), mode, grads, backend=None)
    fused = run(problem().like(torch.float32), mode, grads, backend)
    for name, value in fused.items():
        # Exponentials and their scales meet in the product, each with a rounding of its own.
        slack = 2 * rounding(truth[name], torch.float32)
        assert_as_good_as_eager(name, value, eager[name], truth[name], slack=slack)
    assert bool(on_cutlass) == (backend == "cutlass")


def one_rounding(builder, x, y, z):
    """tl.fma as a GPU has it; the interpreter of some releases rounds the product, too."""
    wide = x.data.astype("f8") * y.data + z.data
    return type(z)(wide.astype(z.data.dtype), z.dtype.scalar)


@pytest.mark.parametrize("below", [1e10, 3e20, 1e30, torch.finfo(torch.float32).max], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_label_that_a_large_bias_removes(monkeypatch, mode, below):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", one_rounding)
    budget, found = MODES[mode] * planner.exponential_words(V) * 4, []
    for backend in ("anchored", "torch"):
        x = make_head(9, V, H, bias=True).like(torch.float32)
        x.labels[3] = 2
        with torch.no_grad():
            x.bias[2] = -below
        if mode == "frozen":
            x.weight.requires_grad_(False), x.bias.requires_grad_(False)
        logps = fastpo.linear_logps(
            x.hidden, x.weight, x.labels, bias=x.bias, budget=budget, backend=backend
        ).logps
        loss = (logps * torch.linspace(-1, 1, 9).where(logps > -1e9, 0)).sum()
        found.append((logps, *torch.autograd.grad(loss, list(x.leaves().values()))))
    for ours, classic in zip(*found, strict=True):
        torch.testing.assert_close(ours, classic)


def test_a_removed_label_has_log_probability_minus_infinity():
    inputs = make_head(3, 40, 8, bias=True)
    inputs.labels[1], inputs.bias[7] = 7, float("-inf")
    inputs.labels[[0, 2]] = 9
    logps = fastpo.linear_logps(
        inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, backend="anchored"
    ).logps
    assert logps.isneginf().tolist() == [False, True, False]


def test_probabilities_computed_again_are_those_that_would_have_been_kept(small_blocks):
    """In a row of hundreds of nats, too, of which every rounded origin has its share."""
    draws = []
    for seed in range(6):
        inputs = make_head(N, V, H, seed=seed)
        inputs.hidden[5] *= 30
        again, kept = (run(inputs.like(torch.float32), x, ("logps",)) for x in ("lean", "keep"))
        truth = run(inputs.like(torch.float64), "keep", ("logps",), backend=None)
        draws.append((again, kept, truth))
    assert_draws(draws)


@pytest.fixture
def launches(monkeypatch, library_products) -> Counter[str]:
    """How often each kernel and each library product runs."""
    found: Counter[str] = Counter()

    def counted(owner, name, word):
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, **k: (found.update([word]), function(*a, **k))[1]
        )

    for module, name in (
        (anchored, "anchored_fwd"),
        (anchored_fold, "anchored_fold"),
        (anchored_again, "anchored_again"),
        (anchored_target, "anchored_target"),
        (anchored_label, "anchored_label"),
        (rows_triton, "forward"),
        (rows_triton, "backward"),
    ):
        counted(module, name, name)
    counted(torch, "mm", "product")
    counted(torch.Tensor, "addmm_", "product")
    return found


FORWARD = {"anchored_target": 1, "anchored_fwd": 1, "anchored_fold": 2, "anchored_again": 2}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("mode", ["score", *MODES])
def test_launches_of_one_call(launches, monkeypatch, mode, blocks):
    """Whatever the vocabulary, one of each; a product of the backward for each block of E."""
    monkeypatch.setattr(planner, "exponential_words", lambda _: {1: 768, 3: 256}[blocks])
    inputs = make_head(N, V, H).like(torch.float32, grad=mode != "score")
    inputs.weight.requires_grad_(mode in ("keep", "lean", "mixed"))
    budget = MODES.get(mode, 0) * 768 * 4
    logps = fastpo.linear_logps(
        inputs.hidden, inputs.weight, inputs.labels, budget=budget, backend="anchored"
    ).logps
    products = {"product": 1} if mode == "frozen" else {}
    assert launches == FORWARD | products
    launches.clear()
    if mode != "score":
        logps.sum().backward()
    again = blocks if mode in ("lean", "mixed") else 0
    operands = {"keep": 1, "lean": 1, "mixed": 2}.get(mode, 0)
    assert launches["product"] == 2 * blocks * operands
    assert launches["anchored_fwd"] == launches["anchored_label"] == again
    assert launches["forward"] == launches["backward"] == 0, "a pass over rows"


def losses(inputs: HeadInputs) -> tuple[torch.Tensor, ...]:
    logps = fastpo.linear_logps(
        inputs.hidden, inputs.weight, inputs.labels, budget=2**40, backend="anchored"
    ).logps
    return logps, (logps * torch.linspace(-1, 1, len(logps))).sum()


@pytest.mark.parametrize("tokens", [13, 17])  # less and more than d weight
def test_d_weight_among_what_was_kept(small_blocks, monkeypatch, tokens):
    """One block behind the one that is read, with the same bits as apart."""
    inputs = make_head(tokens, V, H).like(torch.float32)
    leaves = (inputs.hidden, inputs.weight)
    logps, loss = losses(inputs)
    found = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert found[1].untyped_storage().nbytes() > found[1].nbytes
    before = found[1].clone()
    again = torch.autograd.grad(logps[0], leaves)  # from nothing that was kept
    assert torch.equal(found[1], before) and again[1].isfinite().all()
    monkeypatch.setattr(walk, "_bytes", lambda weight: 0)
    apart = torch.autograd.grad(losses(inputs)[1], leaves)
    assert apart[1].untyped_storage().nbytes() == apart[1].nbytes
    assert all(torch.equal(*pair) for pair in zip(found, apart, strict=True))


def test_all_modes_have_the_same_bits_where_rows_are_computed_again_too(small_blocks):
    found = []
    for mode in ("score", *MODES):
        x = problem().like(torch.float32, grad=mode != "score")
        x.weight.requires_grad_(mode in ("keep", "lean", "mixed"))
        x.bias.requires_grad_(mode in ("keep", "lean", "mixed"))
        budget = MODES.get(mode, 0) * 768 * 4
        found.append(
            fastpo.linear_logps(
                x.hidden, x.weight, x.labels, bias=x.bias, budget=budget, backend="anchored"
            ).logps
        )
    assert found[0].min() < -70 and all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_row_has_the_same_bits_wherever_it_stands(rows):
    x = make_head(40, V, H)
    given = {"outputs": ("logps", "entropy", "lse"), "backend": "anchored"}
    whole = fastpo.linear_logps(x.hidden, x.weight, x.labels, **given)
    for first in (0, 5, 40 - rows):
        part = slice(first, first + rows)
        some = fastpo.linear_logps(x.hidden[part], x.weight, x.labels[part], **given)
        assert torch.equal(some.logps, whole.logps[part])
        assert torch.equal(some.entropy, whole.entropy[part])
        assert torch.equal(some.lse, whole.lse[part])


def test_what_the_hardware_copies_as_blocks():
    x, narrow = (torch.zeros(8, width, dtype=torch.bfloat16) for width in (64, 20))
    assert all(map(anchored_cutlass.in_blocks, (x, x[1:], x[:, :32], narrow[::2])))
    one = x[:1].expand(8, 64)
    assert not any(map(anchored_cutlass.in_blocks, (x[:, 1:33], narrow, one, x.t()[:, :8])))


def test_what_cutlass_takes():
    """It refuses rows that end within 16 bytes, wherever the next one starts."""
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    for given in ((x, x), (x[:3], x), (x[:, :32], x[:, :32])):
        assert anchored_cutlass.serves(*given, None)
    for given in ((x[:, :60], x[:, :60]), (x, x[:7]), (x.float(), x.float())):
        assert not anchored_cutlass.serves(*given, None)


def test_a_temperature_whose_inverse_is_0_in_float32():
    """All words are alike; probabilities are computed again without a division by it."""
    x = make_head(6, 300, 8).like(torch.float32)
    logps = fastpo.linear_logps(
        x.hidden, x.weight, x.labels, temperature=1e300, budget=0, backend="anchored"
    ).logps
    torch.testing.assert_close(logps, torch.full((6,), -math.log(300)))
    assert all((g == 0).all() for g in torch.autograd.grad(logps.sum(), (x.hidden, x.weight)))

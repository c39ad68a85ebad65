"""Bytes that a call takes beside its operands, results and what it keeps: as the planner says."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from _probes import Products, Widest, count_calls

import fastpo
from fastpo import planner
from fastpo.ops.rows.backend import LogitMap
from fastpo.ops.rows.registry import choose
from fastpo.ops.walks.forward import HeadSpec, forward
from fastpo.planning.live import Live

TOKENS, VOCAB, HIDDEN = 512, 1024, 8
TILE = 4 * 256 * 256
# What is as long as the tokens, and sums of d hidden and of a tile's d weight.
SMALL = 96 * 2**10


@pytest.fixture(autouse=True)
def tiles_beside_which_rows_are_small(monkeypatch, library_products):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(256, 256))


def operands(dtype=torch.float32, head=True, tokens=TOKENS, width=HIDDEN):
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, width).to(dtype).requires_grad_(head)
    return hidden, weight


@contextmanager
def bytes_of(live, expected, results=()):
    """Of what is done in the block, whose results `results` then has."""
    before = live.now
    live.forget_peak()
    yield
    found = live.peak - before - sum(x.nbytes for x in results)
    assert expected <= found < expected + SMALL


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_forward_of_a_head(frozen, dtype):
    """Not by its public name: nobody sees what PyTorch's operator does."""
    backend = choose(None, torch.device("cpu"))
    spec = HeadSpec(LogitMap(), None, ("logps",), dtype, backend, frozen, False, None)
    plan = fastpo.plan(TOKENS, VOCAB, HIDDEN, dtype=dtype, train_hidden=frozen, train_head=False)
    with Live() as live:
        given = *operands(dtype), None, torch.arange(TOKENS)
        with bytes_of(live, plan.workspace_bytes):
            forward(*given, spec)


@pytest.mark.parametrize(
    ("dtype", "tokens", "width"), [*((x, TOKENS, HIDDEN) for x in DTYPES), (DTYPES[0], 16, 512)]
)
def test_the_backward_of_a_head(dtype, tokens, width):
    """Of one block of tokens d weight is summed where it stays."""
    plan = fastpo.plan(tokens, VOCAB, width, dtype=dtype, budget=0)
    with Live() as live:
        given = operands(dtype, tokens=tokens, width=width)
        logps = fastpo.linear_logps(*given, torch.arange(tokens), budget=0).logps
        with bytes_of(live, plan.workspace_bytes, found := []):
            found += torch.autograd.grad(logps.sum(), given)


@pytest.mark.parametrize("tokens", [TOKENS, 16])
def test_the_backward_of_a_divergence_of_wide_heads(tokens):
    """d hidden is summed where it stays, and of one block of tokens d weight, too."""
    expected = planner.pair_workspace(tokens, VOCAB, (512, 512), torch.float32, "cpu")
    expected -= 4 * 512 * (tokens if tokens == TOKENS else tokens + 256)
    with Live() as live:
        given = *operands(tokens=tokens, width=512), *operands(tokens=tokens, width=512)
        loss = fastpo.linear_divergence(*given, kind="jsd", budget=0).divergence.sum()
        with bytes_of(live, expected, found := []):
            found += torch.autograd.grad(loss, given[:2])


def test_d_weight_of_several_blocks_of_tokens():
    """One tile of it in float32 at a time."""
    plan = fastpo.plan(TOKENS, VOCAB, 512, dtype=torch.float32, budget=0)
    with Live() as live:
        given = operands(width=512)
        logps = fastpo.linear_logps(*given, torch.arange(TOKENS), budget=0).logps
        with bytes_of(live, plan.workspace_bytes + 4 * 256 * 512, found := []):
            found += torch.autograd.grad(logps.sum(), given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_of_a_divergence(dtype):
    """A teacher that is not trained has its products, and nothing more."""
    expected = planner.pair_workspace(TOKENS, VOCAB, (HIDDEN, HIDDEN), dtype, "cpu")
    if dtype == torch.float32:
        expected -= 4 * TOKENS * HIDDEN  # the sums of d hidden are d hidden
    with Live() as live:
        given = *operands(dtype), *operands(dtype)
        loss = fastpo.linear_divergence(*given, kind="jsd", budget=0).divergence.sum()
        with bytes_of(live, expected, found := []):
            found += torch.autograd.grad(loss, given[:2])


@pytest.mark.parametrize("train", [False, True])
def test_a_mixture_of_three_heads(train):
    """The products of one of them, and the mixture's."""
    with torch.set_grad_enabled(train), Live() as live:
        hiddens, weights = zip(*(operands(head=train) for _ in range(3)), strict=True)
        given = hiddens, weights, (0.5, 0.3, 0.2), torch.arange(TOKENS)
        with bytes_of(live, 2 * TILE, found := []):
            logps = fastpo.mixed_linear_logps(*given).logps
            if train:
                found += torch.autograd.grad(logps.sum(), [*hiddens, *weights])


def test_lists_of_words_of_a_frozen_head():
    """There is nothing as large as the head."""
    with Live() as live:
        hidden, weight = operands(head=False, tokens=16, width=256)
        words = torch.arange(16 * 7).view(16, 7), torch.full((16, 7), -2.0)
        with bytes_of(live, 0):
            found = fastpo.linear_topk_divergence(hidden, weight, *words, kind="jsd", tail=False)
            torch.autograd.grad(found.sum(), hidden)


def test_a_forward_is_planned_once(monkeypatch):
    """Where all rows are scored what is kept is of the rows that are multiplied."""
    plans, make = [], planner.make_plan
    monkeypatch.setattr(planner, "make_plan", lambda *x, **y: (plans.append(x), make(*x, **y))[1])
    with torch.no_grad():
        fastpo.linear_logps(*operands(), torch.arange(TOKENS))
        fastpo.linear_topk(*operands(), 3)
    assert len(plans) == 2


def test_nothing_is_kept_without_grad_mode(monkeypatch):
    """Of operands that are trained."""
    calls = count_calls(monkeypatch)
    hidden, weight = operands()
    with torch.no_grad(), Widest() as widest:
        fastpo.linear_logps(hidden, weight, torch.arange(TOKENS), budget=2**40)
        fastpo.linear_topk(hidden, weight, 3, budget=2**40)
    assert [(spec.hidden_grad, spec.head_grad) for spec in calls] == [(False, False)]
    assert widest.elements <= TILE // 4


def test_d_hidden_that_nobody_wants_is_no_product():
    hidden, weight = operands()
    given = hidden.detach(), weight
    words = torch.arange(TOKENS)
    teacher = {"kind": "reverse_kl", "budget": 2**40}
    losses = {
        "kept": (fastpo.linear_logps(*given, words, budget=2**40).logps, 1),
        "multiplied again": (fastpo.linear_logps(*given, words, budget=0).logps, 2),
        "mixed": (fastpo.mixed_linear_logps(*([x] for x in given), (1.0,), words).logps, 2),
        "pair": (fastpo.linear_divergence(*given, *operands(), **teacher).divergence, 1),
    }
    for name, (loss, expected) in losses.items():
        with Products() as products:
            torch.autograd.grad(loss.sum(), weight)
        assert products.count == expected * TOKENS * VOCAB * HIDDEN, name

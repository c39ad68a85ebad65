"""d weight in the place of the probabilities that were kept for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo import planner
from fastpo.ops.shards.gathered import HeadOptions, score
from fastpo.ops.walks import head as walk
from fastpo.testing import assert_as_good_as_eager, make_head

N, V, H = 12, 211, 16
CELLS = {torch.float32: 4, torch.bfloat16: 2}


@pytest.fixture(params=[planner.Tiles(64, 64), planner.Tiles(5, 64)], ids=["one block", "blocks"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda tokens, vocab, kind: request.param)


def primitive(x, budget):
    return fastpo.linear_logps(x.hidden, x.weight, x.labels, budget=budget).logps


def trainers(x, budget):
    options = HeadOptions(budget=budget)
    some = x.labels != -100
    return score(x.hidden[some], x.weight, None, x.labels[some], options).logps


def gradients(x, head, budget=2**40):
    logps = head(x, budget)
    factor = torch.linspace(-1, 1, len(logps))
    return torch.autograd.grad((logps * factor).sum(), (x.hidden, x.weight))


def lent(dweight: torch.Tensor) -> bool:
    return dweight.untyped_storage().nbytes() > dweight.nbytes


# A token's probabilities take as much as one column of d weight, and 13 cells more.
@pytest.mark.parametrize(
    ("tokens", "expected"), [(7, False), (8, True), (16, True), (18, True), (20, False)]
)
@pytest.mark.parametrize("dtype", CELLS)
@pytest.mark.parametrize("head", [primitive, trainers])
def test_the_same_bits_wherever_d_weight_lies(tiles, monkeypatch, head, dtype, tokens, expected):
    x = make_head(tokens, V, H).like(dtype)
    found = gradients(x, head)
    assert lent(found[1]) == expected
    monkeypatch.setattr(walk, "_bytes", lambda weight: 0)
    apart = gradients(x, head)
    assert not lent(apart[1])
    assert all(torch.equal(*pair) for pair in zip(found, apart, strict=True))


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_rows_that_do_not_count_and_a_budget(tiles, monkeypatch, share):
    x = make_head(16, V, H, ignored=0.4).like(torch.float32)
    budget = int(share * 16 * V * 4)
    found = gradients(x, primitive, budget)
    assert lent(found[1])
    monkeypatch.setattr(walk, "_bytes", lambda weight: 0)
    assert torch.equal(found[1], gradients(x, primitive, budget)[1])


@pytest.mark.parametrize(("hidden", "tokens"), [(torch.bfloat16, 20), (torch.float32, 8)])
def test_a_weight_of_another_dtype(tiles, monkeypatch, hidden, tokens):
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[hidden]
    x = make_head(tokens, V, H).like(other)
    x = replace(x, hidden=x.hidden.detach().to(hidden).requires_grad_())
    found = gradients(x, primitive)
    assert lent(found[1]) and found[1].dtype == other
    monkeypatch.setattr(walk, "_bytes", lambda weight: 0)
    assert torch.equal(found[1], gradients(x, primitive)[1])


@pytest.mark.parametrize("head", [primitive, trainers])
def test_a_second_backward_computes_again(tiles, head):
    x, exact = make_head(N, V, H).like(torch.float32), make_head(N, V, H).like(torch.float64)
    logps = head(x, 2**40)
    first = torch.autograd.grad(logps.sum(), x.weight, retain_graph=True)[0]
    assert lent(first)
    before = first.clone()
    factor = torch.linspace(-1, 1, N)
    second = torch.autograd.grad((logps * factor).sum(), (x.hidden, x.weight))
    assert torch.equal(first, before) and not lent(second[1])
    eager = gradients(x, lambda x, _: torch.log_softmax(x.hidden @ x.weight.t(), -1)[
        range(N), x.labels])  # fmt: skip
    truth = gradients(exact, lambda x, _: torch.log_softmax(x.hidden @ x.weight.t(), -1)[
        range(N), x.labels])  # fmt: skip
    for name, *values in zip(("d hidden", "d weight"), second, eager, truth, strict=True):
        assert_as_good_as_eager(name, *values)


def test_no_gradient_of_the_gradient():
    x = make_head(N, V, H).like(torch.float32)
    found = torch.autograd.grad(primitive(x, 2**40).sum(), x.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        found.square().sum().backward()


def test_nothing_is_lent_where_d_weight_is_added_to_a_gradient():
    x = make_head(N, V, H).like(torch.float32)
    for accumulate in (False, True):
        spec = HeadOptions(accumulate=accumulate).spec(x.hidden, (True, True), x.weight)
        size, _ = walk.kept_shapes(spec.plan(x.hidden, x.weight), spec, x.hidden, x.weight)
        assert (size == N * planner.row_cells(V)) == accumulate


@pytest.mark.parametrize("head", [primitive, trainers])
def test_nothing_is_lent_to_a_frozen_weight(head):
    x = make_head(N, V, H, bias=True).like(torch.float32)
    x.weight.requires_grad_(False)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        shapes = walk.kept_shapes
        patch.setattr(walk, "kept_shapes", lambda *a: (made.append(shapes(*a)), made[-1])[1])
        if head is primitive:
            fastpo.linear_logps(x.hidden, x.weight, x.labels, bias=x.bias, budget=2**40)
        else:
            score(x.hidden, x.weight, x.bias, x.labels, HeadOptions(budget=2**40))
    assert [size for size, _ in made] == [N * planner.row_cells(V)]


def test_the_plan_says_so():
    plan = fastpo.plan(1024, 151_936, 896, dtype=torch.float32, budget=2**40)
    assert plan.shared_bytes == 151_936 * 896 * 4 < plan.kept_bytes
    assert fastpo.plan(2 * 896, 151_936, 896).shared_bytes == 0
    assert fastpo.plan(512, 151_936, 896).shared_bytes == 512 * 151_936 * 2
    assert fastpo.plan(440, 151_936, 896).shared_bytes == 0
    assert fastpo.plan(512, 151_936, 896, train_head=False).shared_bytes == 0
    assert "d weight's place" in str(plan)

"""Several threads through one graph: each finds the gradient it would find alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastpo
from fastpo import planner
from fastpo.ops.rows import torch as rows
from fastpo.ops.shards import gathered
from fastpo.ops.shards.gathered import HeadOptions, score
from fastpo.ops.walks.lending import Loan
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head

N, V, H = 12, 211, 16  # of one block of tokens and four tiles of words
PATIENCE = 60  # seconds until a test gives up on a thread


def primitive(x: HeadInputs) -> torch.Tensor:
    return fastpo.linear_logps(x.hidden, x.weight, x.labels, budget=2**40, backend="torch").logps


def trainers(x: HeadInputs) -> torch.Tensor:
    options = HeadOptions(budget=2**40, backend="torch")
    return score(x.hidden, x.weight, None, x.labels, options).logps


def eager(x: HeadInputs) -> torch.Tensor:
    return torch.log_softmax(x.hidden @ x.weight.t(), -1)[range(N), x.labels]


class Graph:
    """Of one forward, differentiated as often as is asked."""

    def __init__(self, function, dtype=torch.float32) -> None:
        self.x = make_head(N, V, H).like(dtype)
        logps = function(self.x)
        self.loss = (logps * torch.linspace(-1, 1, N, dtype=dtype)).sum()

    def gradient(self, name: str) -> torch.Tensor:
        return torch.autograd.grad(self.loss, getattr(self.x, name), retain_graph=True)[0]


class Stop:
    """Holds the first walk that comes by behind its second tile, until another has gone through."""

    def __init__(self, monkeypatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.tiles, self.held, turn = 0, None, rows.backward

        def backward(*args) -> None:
            turn(*args)
            self.held = self.held or threading.get_ident()
            self.tiles += self.held == threading.get_ident()
            if self.held == threading.get_ident() and self.tiles == 2:
                self.reached.set()
                assert self.go.wait(PATIENCE)

        monkeypatch.setattr(rows, "backward", backward)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_, **__: planner.Tiles(64, 64))


def lent(gradient: torch.Tensor) -> bool:
    return gradient.untyped_storage().nbytes() > gradient.nbytes


# Whichever gradient is asked for, PyTorch has a walk find them all.
@pytest.mark.parametrize(
    ("first", "second"), [("weight", "weight"), ("weight", "hidden"), ("hidden", "weight")]
)
@pytest.mark.parametrize("function", [primitive, trainers])
def test_a_walk_within_a_walk(function, first, second, monkeypatch):
    graph, stop = Graph(function), Stop(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(graph.gradient, first)
        assert stop.reached.wait(PATIENCE)
        try:
            within = graph.gradient(second)
        finally:
            stop.go.set()
        around = held.result(PATIENCE)
    assert lent(around) == (first == "weight")
    assert not lent(within)
    others = Graph(eager), Graph(eager, torch.float64)
    for name, found in ((first, around), (second, within)):
        assert_as_good_as_eager(name, found, *(x.gradient(name) for x in others))


@pytest.mark.parametrize("function", [primitive, trainers])
def test_threads_at_once(function):
    others = Graph(eager), Graph(eager, torch.float64)
    expected = [x.gradient("weight") for x in others]
    threads = 4
    for _ in range(5):
        graph, start = Graph(function), threading.Barrier(threads)

        def gradient(graph=graph, start=start) -> torch.Tensor:
            start.wait(PATIENCE)
            return graph.gradient("weight")

        with ThreadPoolExecutor(threads) as pool:
            found = [pool.submit(gradient) for _ in range(threads)]
        assert sum(lent(x.result()) for x in found) <= 1
        for x in found:
            assert_as_good_as_eager("d weight", x.result(), *expected)


def test_one_thread_at_a_time_adds_to_a_gradient(monkeypatch):
    x = make_head(N, V, H).like(torch.float32)
    options = HeadOptions(backend="torch", accumulate=True)
    losses = [score(x.hidden, x.weight, None, x.labels, options).logps.sum() for _ in range(3)]
    losses.pop().backward()
    once, stop = x.weight.grad.clone(), Stop(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(losses[0].backward)
        assert stop.reached.wait(PATIENCE)
        beside = pool.submit(losses[1].backward)
        assert gathered._ADDING.locked()
        stop.go.set()
        held.result(PATIENCE), beside.result(PATIENCE)
    torch.testing.assert_close(x.weight.grad, 3 * once)


def test_a_loan_is_one_and_of_nobody_who_reads():
    loan = Loan()
    with loan.claim(False) as reading, loan.claim(True) as beside:
        assert reading == (True, False) == beside
    with loan.claim(True) as alone, loan.claim(True) as late:
        assert alone == (True, True)
        assert late == (False, False)
    with loan.claim(False) as later:
        assert later == (False, False)


def test_a_walk_that_fails_has_spent_what_it_may_have_overwritten():
    loan = Loan()
    with pytest.raises(MemoryError), loan.claim(True):
        raise MemoryError
    with loan.claim(True) as later:
        assert later == (False, False)

"""d weight added to `weight.grad` as it is computed, instead of being handed to autograd."""

from __future__ import annotations

import _tiny as tiny
import pytest
import torch
from _tiny import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpo
from fastpo import planner
from fastpo.ops.shards.gathered import HeadOptions, score
from fastpo.testing import make_head

TILES = {"one block": planner.Tiles(64, 64), "blocks": planner.Tiles(5, 64)}


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda tokens, vocab, kind: TILES[request.param])


class Storages(TorchDispatchMode):
    """Bytes of the largest storage that an operation of the block returns, those given apart."""

    def __init__(self, *given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return results


def head(dtype=torch.float32, vocab=211):
    return make_head(13, vocab, 24).like(dtype)


def backward(x, times, options):
    for step in range(times):
        stats = score(x.hidden, x.weight, None, x.labels, options)
        (stats.logps * torch.linspace(-1, 1 + step, len(x.labels))).sum().backward()
    return x.weight.grad


@pytest.mark.parametrize("budget", [0, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_gradient(tiles, dtype, budget):
    own, other = (head(dtype) for _ in range(2))
    expected = backward(own, 3, HeadOptions(budget=budget))
    found = backward(other, 3, HeadOptions(budget=budget, accumulate=True))
    exact = head(dtype).like(torch.float64)
    for step in range(3):
        log_p = torch.log_softmax(exact.hidden @ exact.weight.t(), -1)[range(13), exact.labels]
        (log_p * torch.linspace(-1, 1 + step, 13)).sum().backward()
    error = (found.double() - exact.weight.grad).norm()
    assert error <= 1.5 * (expected.double() - exact.weight.grad).norm() + 1e-6
    torch.testing.assert_close(own.hidden.grad, other.hidden.grad)


def test_the_gradient_stays_the_same_tensor_and_no_second_one_is_made(tiles):
    x = head(vocab=2111)
    options = HeadOptions(budget=0, accumulate=True)
    first = backward(x, 1, options)
    stats = score(x.hidden, x.weight, None, x.labels, options)
    with Storages(x.weight, first) as storages:
        stats.logps.sum().backward()
    assert x.weight.grad is first
    assert storages.largest < x.weight.nbytes


def test_nothing_to_score_adds_nothing(tiles):
    x = head()
    options = HeadOptions(accumulate=True)
    before = backward(x, 1, options).clone()
    none = torch.zeros(0, dtype=torch.int64)
    score(x.hidden[:0], x.weight, None, none, options).logps.sum().backward()
    assert torch.equal(x.weight.grad, before)


def test_a_weight_that_is_no_leaf_gets_its_gradient_from_autograd():
    x = head()
    options = HeadOptions(accumulate=True)
    twice = head()
    for inputs, chosen in ((x, options), (twice, HeadOptions())):
        for _ in range(2):
            scaled = inputs.weight * 2.0
            score(inputs.hidden, scaled, None, inputs.labels, chosen).logps.sum().backward()
    assert torch.equal(x.weight.grad, twice.weight.grad)


ASKED = {
    "autograd.grad": lambda loss, leaf: torch.autograd.grad(loss, leaf)[0],
    "backward(inputs=...)": lambda loss, leaf: loss.backward(inputs=[leaf]),
}


@pytest.mark.parametrize("how", ASKED)
@pytest.mark.parametrize("of", ["hidden", "weight"])
def test_only_what_is_asked_for_gets_a_gradient(how, of):
    results = []
    for accumulate in (False, True):
        x, options = head(), HeadOptions(accumulate=accumulate)
        backward(x, 1, options)
        loss = score(x.hidden, x.weight, None, x.labels, options).logps.square().sum()
        found = ASKED[how](loss, getattr(x, of))
        results.append((found, x.hidden.grad, x.weight.grad))
    torch.testing.assert_close(*results)


def test_a_hook_on_the_weight_changes_all_of_its_gradient():
    """One that leaves words as they are, for one."""
    found = []
    for accumulate in (False, True):
        x = head()
        x.weight.register_hook(lambda grad: grad * (torch.arange(len(grad)) > 100)[:, None])
        found.append(backward(x, 3, HeadOptions(accumulate=accumulate)))
    assert not found[1][:101].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_tied_words_under_attach(tied):
    ids = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(0))
    grads = []
    for accumulate in (False, True):
        model = tiny.model("llama", tie_word_embeddings=tied)
        with fastpo.attach(model, accumulate=accumulate):
            for shift in range(3):
                model(input_ids=ids + shift, labels=ids + shift).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)

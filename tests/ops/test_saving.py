"""What a head keeps for its backward, where hooks or checkpoints handle what is saved."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from _primitives import CALLS, LISTED, N
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastpo
from fastpo.ops.shards.gathered import HeadOptions, score
from fastpo.planning.live import Live
from fastpo.testing import make_head

TOKENS, V, H = 12, 211, 16
WORD = 8  # bytes of the largest number


pytestmark = pytest.mark.usefixtures("group")


class Offloading(saved_tensors_hooks):
    """As TRL has it: a tensor comes back once."""

    def __init__(self):
        self.bytes, self.held = [], {}
        super().__init__(self.pack, self.unpack)

    def pack(self, x):
        self.bytes.append(x.nbytes)
        self.held[len(self.bytes)] = x.clone()
        return len(self.bytes)

    def unpack(self, key):
        return self.held.pop(key)


@pytest.mark.parametrize("name", [x for x, call in CALLS.items() if call.trained])
def test_nothing_large_goes_through_hooks(name):
    call = CALLS[name]
    plain = call.gradients(call.leaves())
    offloading = Offloading()
    with offloading:
        found = call.gradients(call.leaves())
    # Of a list, and of all other words together.
    assert max(offloading.bytes, default=0) <= N * (LISTED + 1) * WORD
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def primitive(hidden, weight, labels):
    return fastpo.linear_logps(hidden, weight, labels, budget=2**40).logps


def trainers(hidden, weight, labels):
    return score(hidden, weight, None, labels, HeadOptions(budget=2**40)).logps


def compiled(hidden, weight, labels):
    torch.compiler.reset()
    return torch.compile(primitive, backend="aot_eager")(hidden, weight, labels)


def recomputed(reentrant):
    return lambda *tensors: checkpoint(primitive, *tensors, use_reentrant=reentrant)


WAYS = {
    "plain": primitive,
    "trainers": trainers,
    "compiled": compiled,
    "checkpoint": recomputed(False),
    "checkpoint, reentrant": recomputed(True),
}
HOOKS = {
    "none": nullcontext,
    "on the host": save_on_cpu,
    "own": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "once": Offloading,
}


def gradients(way, hooks, backwards=1):
    """Of each backward, and the bytes of d weight's memory."""
    x = make_head(TOKENS, V, H).like(torch.float32)
    with hooks():
        logps, found = way(x.hidden, x.weight, x.labels), []
        for last in range(backwards - 1, -1, -1):
            x.hidden.grad = x.weight.grad = None
            logps.backward(torch.linspace(-1, 1, TOKENS), retain_graph=last > 0)
            found += [x.hidden.grad, x.weight.grad]
    return found, x.weight.grad.untyped_storage().nbytes()


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_gradients(way, hooks):
    if (way, hooks) == ("compiled", "once"):
        pytest.skip("a compiled graph unpacks what it has saved as often as it likes")
    found, _ = gradients(WAYS[way], HOOKS[hooks])
    plain, _ = gradients(primitive, nullcontext)
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("way", ["plain", "trainers"])
def test_d_weight_takes_the_place_of_what_was_kept(way, hooks):
    """Once; a second backward computes again, and the first one's gradient stays."""
    _, size = gradients(WAYS[way], HOOKS[hooks])
    assert size > V * H * 4
    (*first, dhidden, dweight), size = gradients(WAYS[way], HOOKS[hooks], backwards=2)
    plain, _ = gradients(primitive, nullcontext)
    assert size == V * H * 4
    assert all(torch.equal(*pair) for pair in zip(first, plain, strict=True))
    torch.testing.assert_close((dhidden, dweight), tuple(plain))


def test_a_checkpoint_hands_out_once_what_few_words_saved():
    """A second look at what was saved is an error there."""

    def over_few(hidden, weight, labels):
        words = torch.stack((labels, (labels + 1) % V), 1)
        return fastpo.linear_logps(hidden, weight, labels, support=words).logps

    def again(*tensors):
        return checkpoint(over_few, *tensors, use_reentrant=False)

    (found, _), (plain, _) = (gradients(way, nullcontext) for way in (again, over_few))
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def test_a_checkpoint_keeps_nothing():
    held = {}
    for name in ("plain", "checkpoint"):
        x = make_head(TOKENS, V, H).like(torch.float32)
        with Live() as live:
            logps = WAYS[name](x.hidden, x.weight, x.labels)
        assert logps.requires_grad
        held[name] = live.now
    assert held["plain"] > 4 * TOKENS * V and held["checkpoint"] < TOKENS * V


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_change_in_place_is_seen_through_hooks(name, hooks):
    x = make_head(TOKENS, V, H).like(torch.float32)
    with HOOKS[hooks]():
        logps = primitive(x.hidden, x.weight, x.labels)
        with torch.no_grad():
            getattr(x, name).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logps.sum().backward()


READ_AGAIN = {
    "divergence": lambda hidden, source, _: fastpo.linear_divergence(
        hidden, source, hidden.detach() + 1, source, kind="forward_kl"
    )[0],
    "topk": lambda hidden, source, _: fastpo.linear_topk(hidden, source, 3).values,
    "mixture": lambda hidden, source, labels: fastpo.mixed_linear_logps(
        [hidden] * 2, [source] * 2, (0.5, 0.5), labels
    )[0],
}


@pytest.mark.parametrize("call", READ_AGAIN)
def test_a_change_in_place_of_what_tiles_are_made_of(call):
    x = make_head(TOKENS, V, H).like(torch.float32)
    stored = (x.weight.detach() * 100).round().to(torch.int8)
    source = fastpo.BlockScaled(stored, torch.full((V, 1), 0.01), (1, H), torch.float32)
    loss = READ_AGAIN[call](x.hidden, source, x.labels).sum()
    stored.add_(1)
    with pytest.raises(RuntimeError, match="weight: expected a tile source as the call found"):
        loss.backward()
    READ_AGAIN[call](
        x.hidden, source, x.labels
    ).sum().backward()  # of the next call it is the beginning

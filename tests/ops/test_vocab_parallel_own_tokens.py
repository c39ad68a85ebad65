"""Divergences of heads in two processes that have tokens of their own, as of whole heads."""

from __future__ import annotations

import itertools

import _processes
import pytest
import torch
import torch.distributed as dist
from _sharded_pair import DTYPES, KINDS, LEAVES, MAPS, MASK, TOKENS, VOCAB, sides
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastpo
from fastpo import planner, reference
from fastpo.ops.linear_divergence import DivergenceOptions
from fastpo.ops.vocab_parallel_divergence import diverge_sharded
from fastpo.ops.walks.mixture import Operands
from fastpo.ops.walks.vocab_shard import VocabShard
from fastpo.testing import assert_as_good_as_eager

OWN = (5, 0, 8)  # own tokens of the processes, turn by turn
OWN_CASES = [
    (kind, mapped, dtype)
    for kind, mapped, dtype in itertools.product(KINDS, MAPS, DTYPES)
    if dtype == "float32" or mapped == "plain"
]


def own_rows(turn: int, rank: int) -> slice:
    """Of the first process those before the second's; the turn after the last has none at all."""
    if turn == len(OWN):
        return slice(0, 0)
    first, second = OWN[turn], OWN[turn - 1]
    return slice(first) if rank == 0 else slice(first, first + second)


def diverge_rows(function, tensors, rows: slice, kind: str, mapped: str, **options):
    """`diverge` of some rows: their divergence, entropy, and the gradients of all tensors."""
    h, w, b, th, tw, tb = tensors
    maps = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in MAPS[mapped].items()}
    given = {**KINDS[kind], **maps, **options}
    found = function(h[rows], w, th[rows], tw, kind=kind, bias=b, teacher_bias=tb, **given)
    found = [torch.where(MASK[rows], x, 0) for x in found]
    factors = torch.linspace(-1, 1, TOKENS, dtype=found[0].dtype)[rows]
    grads = torch.autograd.grad((found[0] * factors).sum(), tensors)
    return [x.detach() for x in found], grads


def own_tokens(rank: int) -> dict:
    mesh = dist.device_mesh.init_device_mesh("cpu", (_processes.PROCESSES,))
    found = {}
    for case, turn in itertools.product(OWN_CASES, range(len(OWN) + 1)):
        kind, mapped, dtype = case
        tensors = [
            x if i % 3 == 0 else distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
            for i, x in enumerate(sides(DTYPES[dtype]))
        ]
        call, rows = fastpo.vocab_parallel_divergence, own_rows(turn, rank)
        given = {"mask": MASK[rows], "teacher_grad": True, "outputs": ("divergence", "entropy")}
        given |= {"own_tokens": True, "budget": 8 * 3 * VOCAB // 2}  # 3 tokens
        values, grads = diverge_rows(call, tensors, rows, kind, mapped, **given)
        assert all(isinstance(x, DTensor) == (i % 3 > 0) for i, x in enumerate(grads))
        grads = [x.full_tensor() if isinstance(x, DTensor) else x for x in grads]
        found[case, turn] = values, grads
    return found


@pytest.mark.parametrize("case", OWN_CASES, ids="-".join)
def test_a_divergence_of_own_tokens(case, found):
    """Each loss is its process's own; d weight is the mean, d hidden is not."""
    kind, mapped, dtype = case
    for turn in range(len(OWN) + 1):
        (first, grads), (second, other_grads) = (each["own_tokens"][case, turn] for each in found)
        rows = slice(own_rows(turn, 1).stop)
        function = reference.linear_divergence
        eager, eager_grads = diverge_rows(function, sides(DTYPES[dtype]), rows, kind, mapped)
        truth, truth_grads = diverge_rows(function, sides(torch.float64), rows, kind, mapped)
        for i, name in enumerate(("divergence", "entropy")):
            value = torch.cat((first[i], second[i]))
            assert_as_good_as_eager(name, value, eager[i], truth[i], factor=4.0)
        for i, name in enumerate(LEAVES):
            if name.endswith("hidden"):
                whole, share = grads[i] + other_grads[i], 1
            else:
                assert torch.equal(grads[i], other_grads[i]), f"{name}: expected the same bits"
                whole, share = grads[i], _processes.PROCESSES
            expected = [x[i] / share for x in (eager_grads, truth_grads)]
            assert_as_good_as_eager(name, whole, *expected, factor=4.0)


# name -> (how often the 13 rows are there, is the teacher in shards, do the heads stay in them?)
TRAVELS = {
    "few": (1, True, True),
    "few_of_a_whole_teacher": (1, False, True),
    "some": (6, True, True),
    "some_of_a_whole_teacher": (6, False, False),
    "many": (10, True, False),
}


def half(x: torch.Tensor, rank: int, often: int) -> torch.Tensor:
    return x[slice(6) if rank == 0 else slice(6, None)].repeat(often, 1)


def travelling(rank: int) -> dict:
    """What the integrations call: hidden states go to the heads, or the heads to them."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (_processes.PROCESSES,))
    calls, own, found = [], VocabShard.merge_pair, {}
    VocabShard.merge_pair = lambda *x: calls.append(x) or own(*x)
    for name, (often, sharded, _) in TRAVELS.items():
        h, w, b, th, tw, tb = sides(torch.float32)
        th, tw, tb = (x.detach() for x in (th, tw, tb))
        w, b = (distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (w, b))
        if sharded:
            tw, tb = (distribute_tensor(x, mesh, [Shard(0)]) for x in (tw, tb))
        operands = Operands(half(h, rank, often), w, b), Operands(half(th, rank, often), tw, tb)
        calls.clear()
        values = diverge_sharded(*operands, None, DivergenceOptions("jsd")).divergence
        grads = torch.autograd.grad(values.square().sum(), (h, w, b))
        grads = [x.full_tensor() if isinstance(x, DTensor) else x for x in grads]
        found[name] = [values.detach(), *grads], bool(calls)
    VocabShard.merge_pair = own
    return found


@pytest.mark.parametrize("name", TRAVELS)
def test_the_lighter_of_tokens_and_heads_travels(name, found):
    often, _, stay = TRAVELS[name]
    (first, shards), (second, others) = (each["travelling"][name] for each in found)
    assert shards == others == stay

    def whole(dtype: torch.dtype) -> list[torch.Tensor]:
        h, w, b, th, tw, tb = sides(dtype)
        rows, other = (torch.cat([half(x, rank, often) for rank in (0, 1)]) for x in (h, th))
        given = {"kind": "jsd", "bias": b, "teacher_bias": tb}
        values = reference.linear_divergence(rows, w, other, tw, **given).divergence
        dhidden, *grads = torch.autograd.grad(values.square().sum(), (h, w, b))
        return [values.detach(), dhidden, *(x / _processes.PROCESSES for x in grads)]

    assert all(torch.equal(*pair) for pair in zip(first[2:], second[2:], strict=True))
    results = torch.cat((first[0], second[0])), first[1] + second[1], *first[2:]
    names, wholes = ("divergence", *LEAVES[:3]), map(whole, (torch.float32, torch.float64))
    for one in zip(names, results, *wholes, strict=True):
        assert_as_good_as_eager(*one, factor=4.0)


def score_half(call, rows: slice, **options) -> torch.Tensor:
    """float16 under autocast in bfloat16, which refuses to concatenate it."""
    h, w, b, *_ = sides(torch.float16)
    labels = torch.arange(TOKENS) % VOCAB
    if options:
        mesh = dist.device_mesh.init_device_mesh("cpu", (_processes.PROCESSES,))
        w, b = (distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in (w, b))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return call(h[rows], w, labels[rows], bias=b, **options).logps


def test_own_tokens_under_autocast(found):
    values = torch.cat([each["half"] for each in found])
    whole = score_half(fastpo.linear_logps, slice(own_rows(0, 1).stop))
    torch.testing.assert_close(values, whole)


def everything(rank: int, folder) -> None:
    """In one start of the processes, which takes longer than all they do."""
    dist.init_process_group("gloo")
    planner.tile_shape = lambda tokens, vocab, kind: planner.Tiles(5, 64)
    found = {"own_tokens": own_tokens(rank), "travelling": travelling(rank)}
    found["half"] = score_half(fastpo.vocab_parallel_logps, own_rows(0, rank), own_tokens=True)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    _processes.run(everything, folder)
    return _processes.loaded(folder)

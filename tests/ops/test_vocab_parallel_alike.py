"""Heads in shards whose processes call with different tokens or options: all raise an error."""

from __future__ import annotations

import inspect

import _processes
import pytest
import torch
import torch.distributed as dist

import fastpo

N, VOCAB, WIDTH, CUT = 9, 31, 8, 12
# What may differ: the words of each process, and how it computes.
OWN = {"weight", "weights", "teacher_weight", "bias", "biases", "teacher_bias"}
OWN |= {"first", "vocab", "group", "budget", "backend"}

g = torch.Generator().manual_seed(0)
HIDDEN, HEAD, OTHER_HIDDEN, OTHER_HEAD = (
    torch.randn(rows, WIDTH, generator=g) for rows in (N, VOCAB, N, VOCAB)
)
LABELS = torch.arange(N)
SUPPORT = torch.stack((LABELS, LABELS + 1), 1)
MASK = torch.arange(N) > 1
WARM = torch.full((N,), 1.5)
MAP = {"temperature": 2.0, "softcap": 5.0, "logit_scale": 0.5}
TEACHER = {"teacher_temperature": 2.0, "teacher_softcap": 5.0, "teacher_logit_scale": 0.5}
SCORED = {"ignore_index": None, "outputs": ("logps", "entropy")}
# function -> what the first process calls with, and what the second changes of it, one at a time
CALLS = {
    "vocab_parallel_logps": (
        {"hidden": HIDDEN, "labels": LABELS},
        {"hidden": HIDDEN[1:], "labels": LABELS.roll(1), "own_tokens": True, "outside": "raw"}
        | {"support": SUPPORT, **MAP, **SCORED},
    ),
    "vocab_parallel_topk": (
        {"hidden": HIDDEN, "k": 2},
        {"hidden": HIDDEN[1:], "k": 3, "exclude": LABELS, "mask": MASK, **MAP},
    ),
    "vocab_parallel_divergence": (
        {"hidden": HIDDEN, "teacher_hidden": OTHER_HIDDEN, "kind": "jsd"},
        {"hidden": HIDDEN[1:], "teacher_hidden": OTHER_HIDDEN[1:], "kind": "forward_kl"}
        | {"own_tokens": True, "beta": 0.1, "alpha": 0.1, "mask": MASK, "teacher_grad": True}
        | {"outputs": ("divergence", "entropy"), **MAP, **TEACHER},
    ),
    "vocab_parallel_mixed_logps": (
        {"hiddens": [HIDDEN, OTHER_HIDDEN], "coefficients": (0.5, 0.5), "labels": LABELS},
        {"hiddens": [HIDDEN[1:], OTHER_HIDDEN[1:]], "coefficients": (0.4, 0.6)}
        | {"labels": LABELS.roll(1), "temperature": 2.0, "softcaps": [None, 5.0]}
        | {"logit_scales": [0.5, 1.0], **SCORED},
    ),
}
# Further ones of `vocab_parallel_logps`: the name that the error has, both calls.
MORE = [
    ("labels", {}, {"labels": LABELS.masked_fill(~MASK, -100)}),
    ("labels", {}, {"labels": LABELS.masked_fill(~MASK, VOCAB)}),
    ("temperature", {"temperature": WARM}, {"temperature": WARM.masked_fill(MASK, 1.0)}),
    ("temperature", {"temperature": 0.0}, {"temperature": 1.0}),
    ("support", {"support": SUPPORT}, {"support": SUPPORT.flip(0)}),
    ("support", *({"support": fastpo.Support.of([[i]] * N)} for i in (1, 2))),
    ("hidden", {}, {"hidden": HIDDEN.clone().requires_grad_()}),
    ("hidden", {"own_tokens": True}, {"own_tokens": True, "hidden": HIDDEN.double()}),
    ("labels", {"own_tokens": True}, {"own_tokens": True, "labels": LABELS.int()}),
    ("labels", {"own_tokens": True}, {"own_tokens": True, "labels": LABELS[1:]}),
    ("temperature", {"own_tokens": True}, {"own_tokens": True, "temperature": 2.0}),
    ("temperature", {"own_tokens": True}, {"own_tokens": True, "temperature": WARM}),
]
# What only looks different.
SAME = [
    ({}, {"budget": 0, "backend": "torch", "temperature": 1}),
    *[({"outputs": x}, {"outputs": [*reversed(x)]}) for x in [("logps", "entropy")]],
    ({"own_tokens": True, "hidden": HIDDEN[1:], "labels": LABELS[1:]}, {"own_tokens": True}),
    (
        {"own_tokens": True, "temperature": WARM},
        {"own_tokens": True, "temperature": WARM[0]},
    ),
]


def call(name: str, rank: int, **given) -> torch.Tensor:
    words = slice(CUT) if rank == 0 else slice(CUT, None)
    heads = {"weight": HEAD[words], "teacher_weight": OTHER_HEAD[words]}
    heads |= {"weights": [*heads.values()]}
    known = inspect.signature(getattr(fastpo, name)).parameters
    heads = {name: head for name, head in heads.items() if name in known}
    return getattr(fastpo, name)(**given, **heads, first=(0, CUT)[rank], vocab=VOCAB)[0]


def refuses(rank: int, function: str, name: str, *calls: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected the same in all processes, got .*, "):
        call(function, rank, **CALLS[function][0] | calls[rank])


def everything(rank: int) -> None:
    dist.init_process_group("gloo")
    for function, (given, changes) in CALLS.items():
        call(function, rank, **given)
        for name, value in changes.items():
            refuses(rank, function, name, {}, {name: value})
    for one in MORE:
        refuses(rank, "vocab_parallel_logps", *one)
    for calls in SAME:
        call("vocab_parallel_logps", rank, **CALLS["vocab_parallel_logps"][0] | calls[rank])
    # Without teacher_grad nobody asks for it.
    teacher = {"teacher_hidden": OTHER_HIDDEN.clone().requires_grad_(rank == 1)}
    given = CALLS["vocab_parallel_divergence"][0] | teacher
    call("vocab_parallel_divergence", rank, **given)


def test_what_differs_is_an_error_in_all_processes():
    """It was a wrong result, or an error in one of them, for which the others waited or aborted."""
    _processes.run(everything)


def of_what(rank: int) -> None:
    """Where a frozen head's forward sums the gradient, and a trained one's does not."""
    dist.init_process_group("gloo")
    head = HEAD[slice(CUT) if rank == 0 else slice(CUT, None)].clone().requires_grad_(rank == 1)
    place = {"first": (0, CUT)[rank], "vocab": VOCAB}
    hidden = HIDDEN.clone().requires_grad_()
    for own in (False, True):
        with pytest.raises(ValueError, match=r"weight: expected the same .*, got frozen, trained"):
            fastpo.vocab_parallel_logps(hidden, head, LABELS, own_tokens=own, **place)
    fastpo.vocab_parallel_logps(HIDDEN, head, LABELS, **place)
    with torch.no_grad():  # in which no head is trained
        fastpo.vocab_parallel_logps(hidden, head, LABELS, own_tokens=True, **place)


def test_a_head_that_one_process_trains():
    _processes.run(of_what)


@pytest.mark.parametrize("name", CALLS)
def test_every_option_is_compared(name):
    assert {*inspect.signature(getattr(fastpo, name)).parameters} - OWN == {*CALLS[name][1]}

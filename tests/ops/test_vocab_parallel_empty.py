"""Heads in shards where a process has no word, as torch cuts few words over many processes."""

from __future__ import annotations

import _processes
import pytest
import torch
import torch.distributed as dist

import fastpo
from fastpo.ops.rows import registry

N, VOCAB, WIDTH = 7, 11, 6
BACKENDS = [
    backend
    for backend in ("cpu", "torch", "triton")
    if registry.unavailable(backend, torch.device("cpu")) is None
]


def leaves() -> list[torch.Tensor]:
    """Hidden states, weight and bias of two heads."""
    g = torch.Generator().manual_seed(0)
    shapes = ((N, WIDTH), (VOCAB, WIDTH), (VOCAB,)) * 2
    return [torch.randn(shape, generator=g) for shape in shapes]


LABELS = torch.arange(N) % VOCAB


def alone(x, call, **options):
    """Of a frozen head the forward makes their gradient."""
    return call(*x[:2], LABELS, bias=x[2], **options).logps


def logps(x, call, **options):
    stats = call(*x[:2], LABELS, bias=x[2], outputs=("logps", "entropy"), **options)
    return stats.logps + 0.3 * stats.entropy


def supported(x, call, **options):
    support = torch.stack((LABELS, (LABELS + 3) % VOCAB, (LABELS + 5) % VOCAB), 1)
    return call(*x[:2], LABELS, bias=x[2], support=support, **options).logps


def divergence(x, call, **options):
    biases = {"bias": x[2], "teacher_bias": x[5]}
    return call(x[0], x[1], x[3], x[4], kind="jsd", **biases, **options).divergence


def best(x, call, **options):
    found = call(*x[:2], 3, bias=x[2], **options)
    return found.values + found.ids


def mixture(x, call, **options):
    heads = [x[0], x[3]], [x[1], x[4]]
    return call(*heads, (0.7, 0.3), LABELS, biases=[x[2], x[5]], **options).logps


CALLS = {
    alone: (fastpo.linear_logps, fastpo.vocab_parallel_logps),
    logps: (fastpo.linear_logps, fastpo.vocab_parallel_logps),
    supported: (fastpo.linear_logps, fastpo.vocab_parallel_logps),
    divergence: (fastpo.linear_divergence, fastpo.vocab_parallel_divergence),
    best: (fastpo.linear_topk, fastpo.vocab_parallel_topk),
    mixture: (fastpo.mixed_linear_logps, fastpo.vocab_parallel_mixed_logps),
}


def gradients(values: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor | None]:
    weights = torch.linspace(1, 2, values.numel()).view(values.shape)
    return list(torch.autograd.grad((values * weights).sum(), given, allow_unused=True))


def with_none(rank: int, owner: int) -> None:
    """All words lie in the process `owner`."""
    words = slice(None) if rank == owner else slice(0)
    first = VOCAB if rank > owner else 0
    for (run, (whole, sharded)), backend in ((c, b) for c in CALLS.items() for b in BACKENDS):
        expected = [x.requires_grad_() for x in leaves()]
        given = [x if x.shape[0] == N else x[words].clone() for x in leaves()]
        given = [x.requires_grad_() for x in given]
        if run in (alone, logps):  # a frozen head has the gradient of its hidden states alone
            frozen = [given[0], *(x.detach() for x in given[1:3])]
            hidden = run(frozen, sharded, backend=backend, first=first, vocab=VOCAB)
            (dhidden,) = gradients(hidden, frozen[:1])
            expected_frozen = [expected[0], *(x.detach() for x in expected[1:3])]
            (theirs,) = gradients(run(expected_frozen, whole, backend=backend), expected[:1])
            torch.testing.assert_close(dhidden, theirs, rtol=1e-4, atol=1e-5)
        wanted = run(expected, whole, backend=backend)
        found = run(given, sharded, backend=backend, first=first, vocab=VOCAB)
        torch.testing.assert_close(found, wanted)
        ours, theirs = gradients(found, given), gradients(wanted, expected)
        for x, own, all_words in zip(given, ours, theirs, strict=True):
            if all_words is None:
                assert own is None
            else:
                part = all_words if x.shape[0] == N else all_words[words]
                torch.testing.assert_close(own, part, rtol=1e-4, atol=1e-5)


def everything(rank: int) -> None:
    dist.init_process_group("gloo")
    for owner in range(_processes.PROCESSES):
        with_none(rank, owner)
    first = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="group: expected one that this process is in"):
            logps(leaves(), fastpo.vocab_parallel_logps, first=0, vocab=VOCAB, group=first)
    dist.destroy_process_group()


def test_a_process_without_words():
    _processes.run(everything)


def test_one_process_needs_a_word():
    hidden, weight, _, *_ = leaves()
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, 6\), got \(0, 6\)"):
        fastpo.linear_logps(hidden, weight[:0], LABELS)

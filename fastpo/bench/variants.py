"""What is timed: fastpo on every backend, plain PyTorch, and the bare products below them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastpo
from fastpo import planner
from fastpo.ops.rows import registry
from fastpo.testing import HeadInputs

Case = Literal["score", "frozen", "trainable"]
CASES: dict[Case, int] = {"score": 1, "frozen": 2, "trainable": 3}  # products at best
# Beside log-probabilities what TRL's trainers log.
STATISTICS = ("entropy", "mean_logits", "is_top1")


class Outcome(NamedTuple):
    """logps: [N], or [R] sums of N/R consecutive ones. loss: what is differentiated instead."""

    logps: Tensor
    loss: Tensor | None = None


Forward = Callable[[HeadInputs], Outcome]


@dataclass(frozen=True)
class Variant:
    """One way to do one case; `make` imports what it needs and says why it cannot."""

    name: str
    case: Case
    make: Callable[[], Forward]
    own: bool = False
    compiles: bool = False  # its first run is long for another reason than its work


class Result(NamedTuple):
    logps: Tensor  # as in Outcome
    grads: dict[str, Tensor]  # empty where the loss was the variant's own


def run(variant: Variant, forward: Forward, x: HeadInputs, upstream: Tensor) -> Result:
    """One forward and, where the case has one, its backward; upstream [N] is d loss / d logp."""
    x.hidden.requires_grad_(variant.case != "score")
    x.weight.requires_grad_(variant.case == "trainable")
    leaves = x.leaves()
    with torch.set_grad_enabled(bool(leaves)):
        outcome = forward(x)
        if not leaves:
            return Result(outcome.logps, {})
        if outcome.loss is not None:
            torch.autograd.grad(outcome.loss, list(leaves.values()))
            return Result(outcome.logps, {})
        logps = outcome.logps
        grads = torch.autograd.grad(logps, list(leaves.values()), upstream.to(logps))
    return Result(logps.detach(), dict(zip(leaves, grads, strict=True)))


def own_variants(device: torch.device) -> list[Variant]:
    found = []
    for backend in registry.BACKENDS:
        name = f"fastpo {backend}"
        found += [
            Variant(name, "score", _fused(backend, None, device), own=True),
            Variant(name, "frozen", _fused(backend, None, device), own=True),
            Variant(f"{name} keep", "trainable", _fused(backend, 2**62, device), own=True),
            Variant(f"{name} lean", "trainable", _fused(backend, 0, device), own=True),
        ]
        logged: dict[Case, str] = {"score": "statistics", "trainable": "keep statistics"}
        found += [
            Variant(f"{name} {mode}", case, _fused(backend, 2**62, device, STATISTICS), own=True)
            for case, mode in logged.items()
        ]
    return found


def _fused(
    backend: str, budget: int | None, device: torch.device, statistics: tuple[str, ...] = ()
) -> Callable[[], Forward]:
    given: dict[str, Any] = {"outputs": ("logps", *statistics), "budget": budget}

    def logps(x: HeadInputs) -> Outcome:
        stats = fastpo.linear_logps(x.hidden, x.weight, x.labels, backend=backend, **given)
        assert stats.logps is not None
        return Outcome(stats.logps)

    def make() -> Forward:
        registry.choose(backend, device)
        if device.type == "cpu" and backend not in ("cpu", "torch"):
            raise RuntimeError("in Triton's interpreter a time says nothing")
        return logps

    return make


def eager(x: HeadInputs) -> Outcome:
    """What a trainer without a fused head computes: logits, float32, log-softmax, one of them."""
    log_p = torch.log_softmax((x.hidden @ x.weight.t()).float(), -1)
    return Outcome(log_p.gather(1, x.labels.unsqueeze(1)).squeeze(1))


def plain_variants() -> list[Variant]:
    return [Variant("eager", case, lambda: eager) for case in CASES] + [
        Variant("torch.compile", case, _compiled, compiles=True) for case in CASES
    ]


def _compiled() -> Forward:
    # Over the limit it would run eager and say nothing; fullgraph makes that an error.
    torch._dynamo.config.recompile_limit = 64
    # dynamic: a training has another number of tokens in every step.
    return torch.compile(eager, dynamic=True, fullgraph=True)


def bare_products(x: HeadInputs, case: Case) -> None:
    """The floor: the products of the case over the tiles of `linear_logps`, and nothing else."""
    n, v = len(x.labels), x.weight.shape[0]
    tiles = planner.tile_shape(n, v, x.hidden.device.type)
    hidden, weight = x.hidden.detach(), x.weight.detach()
    buffer = hidden.new_empty(tiles.tokens * tiles.vocab)
    dhidden = hidden.new_empty(tiles.tokens, hidden.shape[1])
    dweight = weight.new_empty(tiles.vocab, hidden.shape[1])
    for a in range(0, n, tiles.tokens):
        block = hidden[a : a + tiles.tokens]
        for v0 in range(0, v, tiles.vocab):
            words = weight[v0 : v0 + tiles.vocab]
            tile = buffer[: len(block) * len(words)].view(len(block), len(words))
            torch.mm(block, words.t(), out=tile)
            if case != "score":
                torch.mm(tile, words, out=dhidden[: len(block)])
            if case == "trainable":
                torch.mm(tile.t(), block, out=dweight[: len(words)])

"""A token has the same bits wherever its row stands and whatever the other rows are."""

from __future__ import annotations

import pytest
import torch
from test_linear_logps import BACKENDS, DEVICE

import fastpo
from fastpo import planner

OUTPUTS = ("logps", "entropy", "lse")
EVERY_OUTPUT = tuple(fastpo.TokenStats._fields)
# Own products, and library products on a CPU; a GPU's library chooses its kernel by the shape.
OWN = ("anchored", "cutlass")
INVARIANT = [b for b in BACKENDS if DEVICE == "cpu" or b in OWN]
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # what its own products serve
COUNTS = {"torch": range(1, 301), "cpu": range(1, 301)}


def numbers(hidden, weight, backend):
    labels = torch.full((len(hidden),), 3, device=hidden.device)
    stats = fastpo.linear_logps(hidden, weight, labels, outputs=OUTPUTS, backend=backend)
    return torch.stack([getattr(stats, name) for name in OUTPUTS], -1)


def head(size, vocab):
    torch.manual_seed(0)
    x, weight = torch.randn(size, device=DEVICE), 0.3 * torch.randn(vocab, size, device=DEVICE)
    return x.to(DTYPE), weight.to(DTYPE)


@pytest.mark.parametrize("backend", INVARIANT)
@pytest.mark.parametrize(("size", "vocab"), [(64, 1000), (33, 77)])
def test_duplicate_rows_at_every_position(size, vocab, backend):
    x, weight = head(size, vocab)
    expected = numbers(x.expand(7, size), weight, backend)[0]
    for n in COUNTS.get(backend, (1, 2, 7, 16, 33, 65)):
        found = numbers(x.expand(n, size), weight, backend)
        assert torch.equal(found, expected.expand_as(found)), n


@pytest.mark.parametrize("backend", INVARIANT)
@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "lean"])
def test_parts_of_a_batch(mode, backend):
    """In every mode, with bias and scales, also where rows are left out."""
    x, weight = head(40, 333)
    hidden = x + torch.randn(53, 40, device=DEVICE).to(DTYPE)
    labels = torch.randint(0, 333, (53,), device=DEVICE)
    options = {
        "bias": torch.randn(333, device=DEVICE),
        "temperature": 0.7,
        "budget": 0 if mode == "lean" else None,
    }
    grad = mode in ("keep", "lean")
    trained = weight if mode != "frozen" else weight.detach()

    def part(rows, labels=labels):
        h = hidden[rows].detach().requires_grad_(mode != "score")
        w = trained.detach().requires_grad_(grad)
        stats = fastpo.linear_logps(h, w, labels[rows], outputs=OUTPUTS, backend=backend, **options)
        return torch.stack([getattr(stats, name).detach() for name in OUTPUTS], -1)

    whole = part(slice(None))
    for rows in (slice(0, 1), slice(3, 20), slice(50, 53), torch.tensor([52, 0, 7, 7])):
        assert torch.equal(part(rows), whole[rows])
    ignored = labels.clone()
    ignored[::3] = -100
    kept = ignored != -100
    assert torch.equal(part(slice(None), ignored)[kept], whole[kept])


@pytest.mark.parametrize("backend", [b for b in INVARIANT if b in COUNTS])
def test_rows_of_all_kinds_at_every_place_of_a_register(backend):
    """Some functions of PyTorch round the rest of a vector otherwise, in one row of hundreds."""
    _, weight = head(7, 50)
    hidden, labels = torch.randn(4001, 7), torch.randint(0, 50, (4001,))

    def part(rows):
        stats = fastpo.linear_logps(
            hidden[rows], weight, labels[rows], outputs=EVERY_OUTPUT, backend=backend
        )
        return torch.stack([x.float() for x in stats], -1)

    whole = part(slice(None))
    for n in range(1, 32):
        parts = [part(rows) for rows in torch.arange(4001).split(16 * 7 + n)]
        assert torch.equal(torch.cat(parts), whole), n


def test_tiles_are_as_wide_for_any_number_of_tokens():
    for device in ("cpu", "cuda"):
        assert len({planner.tile_shape(n, 10**6, device).vocab for n in (1, 7, 300, 10**5)}) == 1

"""The forward without logits: its kernels against float64, rows computed again, its selection.

`linear_logps` on top of it is in test_linear_logps.py, with the other backends; what a GPU alone
can show is at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from _triton import DEVICE, MARKS
from torch import Tensor

import fastpo
from fastpo import planner, reference
from fastpo.ops.rows import backend as R
from fastpo.ops.rows import registry
from fastpo.ops.walks import anchored as walk
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head, max_error

triton = pytest.importorskip("triton")

from fastpo.kernels import (  # noqa: E402
    _blocks,
    anchored,
    anchored_again,
    anchored_fold,
    anchored_target,
)

interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="float32 products are for the CPU")
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
pytestmark = MARKS
PRODUCTS = [
    name
    for name in ("anchored", "cutlass")
    if registry.unavailable(name, torch.device(DEVICE)) is None
]
FACTORS = {"plain": 1.0, "scaled": -1.3 / 0.7}
# The walk of the shipped blocks in small: several groups, several blocks a program.
SMALL = {
    "pointers": _blocks.GemmBlocks(16, 64, 32, 2, 1, num_stages=2, num_warps=4, tma=False),
    "descriptors": _blocks.GemmBlocks(16, 64, 32, 2, 3, num_stages=2, num_warps=4, tma=True),
}
WORDS, ABOVE = 64, 2  # of a block of E, and rows of other tokens above those of a tile


@dataclass
class Tile:
    """Rows, all words, and what the kernels make of them."""

    x: Tensor  # [n, H]
    words: Tensor  # [v, H]
    labels: Tensor  # [n]
    bias: Tensor | None  # [v]
    factor: float
    stored: int

    def logits(self) -> Tensor:
        z = self.x.double() @ self.words.double().t()
        return (z if self.bias is None else z + self.bias.double()) * self.factor

    def run(self, blocks: _blocks.GemmBlocks, stats: int = 0, words: int = WORDS) -> Tile:
        n, v = len(self.x), len(self.words)
        rows = (self.x, self.words, self.labels, self.bias)
        self.state = torch.empty(R.STATE, n)
        origin, base, self.offset = torch.empty(3, n)
        anchored_target.anchored_target(
            *rows, self.state[R.TARGET], origin, base, factor=self.factor
        )
        count, height = -(-v // words), self.stored + ABOVE + 1
        cells = torch.full(((count + 1) * height * words,), 9.0)  # one block more than there is
        e = anchored.Exponentials(cells, height, words, ABOVE, self.stored)
        self.partial = torch.empty(anchored.SUMS.value if stats else 1, -(-v // blocks.v), n)
        given = {"factor": self.factor, "stats": stats}
        anchored.anchored_fwd(*rows, base, self.partial, e, blocks, 3, **given)
        given["largest"] = walk._LARGEST_SUM
        fold = {**given, "vocab": v}
        kept = (self.labels, origin, self.state, self.offset, e)
        anchored_fold.anchored_fold(self.partial, None, *kept, **fold)
        self.again = self.state[R.OTHERS] > walk._LARGEST_SUM
        maxima = torch.empty(-(-v // anchored_again.WORDS), n)
        again = torch.empty(len(self.partial), *maxima.shape)
        others = self.state[R.OTHERS]
        anchored_again.anchored_again(*rows, others, maxima, None, None, **given)
        anchored_again.anchored_again(*rows, others, maxima, again, e, **given)
        anchored_fold.anchored_fold(again, maxima, *kept, **fold)
        e = cells.view(count + 1, height, words)
        assert (e[-1] == 9.0).all(), "wrote behind the last words"
        e = e[:-1].transpose(0, 1).reshape(height, -1)
        assert (e[:ABOVE] == 9.0).all() and (e[-1] == 9.0).all(), "wrote to rows of others"
        self.e = e[ABOVE:-1, :v]
        return self

    def true_state(self) -> tuple[dict[int, Tensor], Tensor]:
        """Beside the maximum that was found; and e, with the label's cell."""
        z, label = self.logits(), self.labels.unsqueeze(1)
        own = z.gather(1, label)
        d = z - self.state[R.MAX].double().unsqueeze(1)
        e = d.exp().scatter(1, label, 0.0)
        beaten = (z.scatter(1, label, -math.inf) > own).any(1)
        state = {
            R.OTHERS: e.sum(1),
            R.TARGET: own.squeeze(1),
            R.MOMENT: (e * d).sum(1),
            R.SQUARES: e.square().sum(1),
            R.SUM: z.sum(1),
            R.BEFORE: torch.where(beaten, math.inf, -math.inf).double(),
        }
        unit = self.offset.double().exp().unsqueeze(1)
        return state, (e.scatter(1, label, -e.sum(1, keepdim=True)) / unit)[: self.stored]


BITS = {R.OTHERS: 0, R.TARGET: 0, R.MOMENT: 1, R.SQUARES: 2, R.SUM: 4, R.BEFORE: 8}


def make_tile(n: int, v: int, H: int, factor: float, dtype=torch.float32) -> Tile:
    g = torch.Generator().manual_seed(0)
    x, words = torch.randn(n, H, generator=g), torch.randn(v, H, generator=g) * 0.4
    labels = torch.randint(0, v, (n,), generator=g)
    labels[-1] = v - 1
    bias = torch.randn(v, generator=g)
    return Tile(x.to(dtype), words.to(dtype), labels, bias, factor, stored=n * 2 // 3)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("blocks", SMALL)
@pytest.mark.parametrize("shape", [(1, 1, 8), (50, 141, 40), (40, 64, 16)], ids=str)
def test_exponentials_and_their_sums(shape, blocks, factor, dtype):
    tile = make_tile(*shape, FACTORS[factor], dtype).run(SMALL[blocks])
    true, e = tile.true_state()
    for row in (R.TARGET, R.OTHERS):
        torch.testing.assert_close(tile.state[row].double(), true[row], rtol=1e-5, atol=1e-6)
    assert torch.equal(tile.state[R.MAX], tile.state[R.TARGET]) and not tile.again.any()
    torch.testing.assert_close(tile.e.double(), e, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("stats", [1, 2, 4, 8, 15])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("blocks", SMALL)
def test_statistics_in_passing(blocks, factor, stats):
    tile = make_tile(50, 141, 40, FACTORS[factor])
    best = tile.logits().argmax(1)
    tile.labels[:20] = best[:20]
    plain = replace(tile).run(SMALL[blocks])
    tile.run(SMALL[blocks], stats=stats)
    assert torch.equal(tile.state[R.OTHERS], plain.state[R.OTHERS])
    assert torch.equal(tile.e, plain.e)
    for row, true in tile.true_state()[0].items():
        if BITS[row] & ~stats:
            assert tile.state[row].isnan().all(), "written, though nobody asked"
        else:
            size = tile.logits().abs().sum(1).max() if row == R.SUM else 1.0
            torch.testing.assert_close(tile.state[row].double(), true, rtol=1e-5, atol=2e-7 * size)


@interpreted
def test_the_rounding_of_an_origin_s_exponent_is_taken_out_again():
    """Of logits of 1,000, each without a rounding and of two words."""
    tile = make_tile(50, 140, 40, 1.0)
    for x in (tile.x, tile.words, tile.bias):
        x.mul_(8).round_().div_(8)
    tile.words[70:], tile.bias[70:] = tile.words[:70], tile.bias.add_(1000)[:70]
    tile.labels[:20] = tile.logits().argmax(1)[:20]
    true, e = tile.run(SMALL["pointers"], stats=15).true_state()
    for row, value in true.items():
        torch.testing.assert_close(tile.state[row].double(), value, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(tile.e.double(), e, rtol=3e-6, atol=0)


@interpreted
@pytest.mark.parametrize("factor", FACTORS)
def test_rows_that_overflow_are_computed_again_and_no_others(monkeypatch, factor):
    monkeypatch.setattr(anchored_again, "WORDS", 96)  # so that several programs share a row
    tile = make_tile(70, 230, 24, FACTORS[factor])
    before = replace(tile).run(SMALL["pointers"], stats=15)
    for row in (3, 40, 69):  # rows that are stored, and one that is not
        tile.x[row] *= 40
        tile.labels[row] = tile.logits()[row].argmin()
    tile.run(SMALL["pointers"], stats=15)
    assert tile.again.nonzero().squeeze(1).tolist() == [3, 40, 69]
    others = ~tile.again
    assert torch.equal(tile.state[:, others], before.state[:, others])
    assert torch.equal(tile.e[others[:46]], before.e[others[:46]])
    z = tile.logits()
    torch.testing.assert_close(
        tile.state[R.MAX, tile.again].double(), z.amax(1)[tile.again], rtol=1e-6, atol=0
    )
    # Logits of hundreds of nats have float32 roundings of hundreds of ulps of 1.
    rtol = z.abs().max().item() * torch.finfo(torch.float32).eps * 2
    true, e = tile.true_state()
    for row, value in true.items():
        atol = rtol * (len(tile.words) if row == R.SUM else 1)
        torch.testing.assert_close(tile.state[row].double(), value, rtol=rtol, atol=atol)
    torch.testing.assert_close(tile.e.double(), e, rtol=rtol, atol=1e-6)


@interpreted
@pytest.mark.parametrize("blocks", [_blocks.gemm_blocks(False), _blocks.gemm_blocks(True)], ids=str)
def test_the_shipped_blocks(blocks):
    tile = make_tile(130, 300, 72, 1.0).run(blocks, words=planner.GRANULE)
    assert tile.partial.shape == (1, -(-300 // blocks.v), 130)
    true, e = tile.true_state()
    torch.testing.assert_close(tile.state[R.OTHERS].double(), true[R.OTHERS], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(tile.e.double(), e, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("outside", [-100, 200, 2**40])
def test_a_label_outside_the_vocabulary_leaves_finite_exponentials(outside):
    """An ignored row on a GPU: its target is NaN, and its stored numbers times 0 must stay 0."""
    tile = make_tile(20, 200, 8, 1.0)
    tile.labels[4] = outside
    tile.run(SMALL["descriptors"])
    assert tile.state[R.TARGET].isnan().tolist() == [row == 4 for row in range(20)]
    assert tile.e.isfinite().all() and tile.state[R.OTHERS].isfinite().all()
    assert (tile.e[4] >= 0).all(), "no cell is a label's"


def count_products(monkeypatch) -> list[str]:
    """Which forward ran: a word for each tile or block of rows."""
    ran: list[str] = []
    fold, products = walk._fold, fastpo.ops.walks.head.Head.products

    def note(word, function):
        return lambda *args, **named: (ran.append(word), function(*args, **named))[1]

    monkeypatch.setattr(walk, "_fold", note("anchored", fold))
    monkeypatch.setattr(fastpo.ops.walks.head.Head, "products", note("classic", products))
    return ran


@interpreted
@pytest.mark.parametrize(
    ("backend", "dtype", "outputs", "ran"),
    [
        ("anchored", torch.float32, ("logps", "lse"), {"anchored"}),
        ("anchored", torch.float32, ("logps", "entropy", "is_top1"), {"anchored"}),
        ("anchored", torch.float16, ("logps",), {"classic"}),
        ("triton", torch.float32, ("logps",), {"classic"}),
        (None, torch.float32, ("logps",), {"classic"}),
    ],
)
def test_selected_by_name_where_it_serves(monkeypatch, backend, dtype, outputs, ran):
    found = count_products(monkeypatch)
    x = make_head(4, 50, 8, dtype=dtype)
    fastpo.linear_logps(x.hidden, x.weight, x.labels, outputs=outputs, backend=backend)
    assert set(found) == ran


@interpreted
@pytest.mark.parametrize("tokens", [10, 40])
@pytest.mark.parametrize("frozen", [True, False])
def test_no_logits_tile_is_allocated(monkeypatch, frozen, tokens):
    """The float32 tile of the classic forward never exists; a frozen head needs E of some rows."""
    made: list[int] = []
    empty = fastpo.ops.walks.head.Head.empty

    def noted(self, *shape, dtype):
        made.append(math.prod(shape))
        return empty(self, *shape, dtype=dtype)

    monkeypatch.setattr(fastpo.ops.walks.head.Head, "empty", noted)
    monkeypatch.setattr("fastpo.planner.frozen_rows", lambda *_: 16)
    x = make_head(tokens, 300, 8)
    fastpo.linear_logps(x.hidden.requires_grad_(frozen), x.weight, x.labels, backend="anchored")
    assert max(made) <= (min(16, tokens) * planner.padded(300) if frozen else 40 * 8)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows, of E and of what is computed again."""
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(8, 64))
    monkeypatch.setattr(planner, "frozen_rows", lambda *_: 5)
    monkeypatch.setattr(planner, "exponential_words", lambda _: 512)
    monkeypatch.setattr(planner, "recomputed_words", lambda *_: 256)


@interpreted
@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
def test_overflow_in_the_middle_of_the_vocabulary(small_blocks, mode):
    inputs = make_head(20, 700, 16, bias=True)
    inputs.labels[:] = 3
    inputs.bias[:48] -= 60.0
    inputs.bias[100:104] += 90.0
    found = {}
    for name, dtype, backend in (("truth", torch.float64, None), ("eager", torch.float32, None),
                                 ("fused", torch.float32, "anchored")):  # fmt: skip
        x = inputs.like(dtype)
        x.weight.requires_grad_(mode != "frozen"), x.bias.requires_grad_(mode != "frozen")
        if backend is None:
            logps = reference.linear_logps(x.hidden, x.weight, x.labels, bias=x.bias).logps
        else:
            logps = fastpo.linear_logps(
                x.hidden, x.weight, x.labels, bias=x.bias, backend=backend,
                budget=0 if mode == "lean" else 2**40,
            ).logps  # fmt: skip
        leaves = x.leaves()
        loss = (logps * torch.linspace(-1, 1, 20)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        found[name] = {"logps": logps, **dict(zip(leaves, grads, strict=True))}
    assert found["truth"]["logps"].max() < -100
    for name, value in found["fused"].items():
        assert_as_good_as_eager(name, value, found["eager"][name], found["truth"][name])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "lean"])
def test_a_large_vocabulary_on_a_gpu(mode, softcap, product):
    """bf16 against float64 at V = 128,256; ragged rows, an ignored one, one that overflows."""
    inputs = make_head(300, 128_256, 512, dtype=torch.bfloat16, device=DEVICE, ignored=0.1)
    inputs.labels[-1] = 128_255
    with torch.no_grad():
        inputs.hidden[7] *= 40  # hundreds of nats above its label
        inputs.labels[7] = (inputs.hidden[7] @ inputs.weight.t()).argmin()
    found = {}
    for name, dtype in (("truth", torch.float64), ("eager", torch.bfloat16),
                        ("fused", torch.bfloat16)):  # fmt: skip
        x = inputs.like(dtype, grad=mode != "score")
        x.weight.requires_grad_(mode in ("keep", "lean"))
        found[name] = _losses(x, mode, product if name == "fused" else None, softcap)
    for name, value in found["fused"].items():
        assert_as_good_as_eager(name, value, found["eager"][name], found["truth"][name])
    error = (found["fused"]["logps"] - found["truth"]["logps"]).abs()
    assert (error <= 2e-4 * (1 + found["truth"]["logps"].abs())).all()


def _losses(
    x: HeadInputs, mode: str, backend: str | None, softcap: float | None
) -> dict[str, Tensor]:
    """backend: None is eager."""
    if backend is not None:
        budget = 0 if mode == "lean" else 2**40
        logps = fastpo.linear_logps(
            x.hidden, x.weight, x.labels, softcap=softcap, budget=budget, backend=backend
        ).logps
    else:
        logps = reference.linear_logps(x.hidden, x.weight, x.labels, softcap=softcap).logps
    leaves = x.leaves()
    factor = torch.linspace(-1, 1, len(x.labels), device=logps.device)
    grads = torch.autograd.grad((logps * factor).sum(), list(leaves.values())) if leaves else ()
    return {"logps": logps, **dict(zip(leaves, grads, strict=True))}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("hidden", [512, 500])  # loaded through descriptors, and not
def test_same_bits_in_all_modes_and_no_waiting_on_a_gpu(hidden, product):
    inputs = make_head(200, 50_257, hidden, dtype=torch.bfloat16, device=DEVICE, ignored=0.1)
    with torch.no_grad():
        inputs.hidden[5] *= 40
        inputs.labels[5] = (inputs.hidden[5] @ inputs.weight.t()).argmin()
    results = []
    for guarded in (False, True):  # compile outside the guard
        torch.cuda.set_sync_debug_mode("error" if guarded else "default")
        try:
            for mode in ("score", "frozen", "keep", "lean"):
                x = inputs.like(torch.bfloat16, grad=mode != "score")
                x.weight.requires_grad_(mode in ("keep", "lean"))
                results.append(_losses(x, mode, product, None)["logps"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("vocab", [40_000, 40_003])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("outputs", [("logps",), tuple(n for n in OUTPUTS if n != "is_top1")])
def test_all_products_agree_on_a_gpu(monkeypatch, vocab, offset, outputs):
    """Descriptors, pointers and CUTLASS on one machine: the blocks differ, the sums hardly."""
    x = make_head(300, vocab, 256, dtype=torch.bfloat16, device=DEVICE, bias=offset)
    rows = (x.hidden, x.weight, x.labels)
    given = {"bias": x.bias, "temperature": 0.8, "outputs": outputs}
    found = [fastpo.linear_logps(*rows, backend=product, **given) for product in PRODUCTS]
    monkeypatch.setattr(walk, "is_hopper", lambda device: False)
    last = fastpo.linear_logps(*rows, backend="anchored", **given)
    for name in outputs:
        expected = getattr(last, name)
        allowed = 2e-6 * (1 + expected.abs().max())
        assert all(max_error(getattr(one, name), expected) <= allowed for one in found), name

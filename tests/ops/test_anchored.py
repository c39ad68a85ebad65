"""The forward without logits: its kernels against float64, rows computed again, its selection.

`linear_logps` on top of it is in test_linear_logps.py, with the other backends; what a GPU alone
can show is at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import planner, reference
from fastpo.ops.rows import backend as R
from fastpo.ops.rows import registry
from fastpo.ops.rows import triton as rows_triton
from fastpo.ops.walks import anchored as walk
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head, max_error

triton = pytest.importorskip("triton")

from fastpo.kernels import _blocks, anchored, anchored_fold, anchored_target  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reason = rows_triton.unavailable(torch.device(DEVICE))
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="float32 products are for the CPU")
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    # The interpreter is numpy, which warns where a GPU makes its infinities in silence.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
PRODUCTS = [
    name
    for name in ("anchored", "cutlass")
    if registry.unavailable(name, torch.device(DEVICE)) is None
]
MAPS = {
    "plain": R.LogitMap(),
    "scaled": R.LogitMap(temperature=0.7, logit_scale=-1.3),
    "softcap": R.LogitMap(temperature=1.6, softcap=5.0, logit_scale=-0.8),
}
# What the words of earlier tiles have left: it has to join the tile's own.
START = torch.tensor([math.nan, 1.0, math.nan, -2.0, 0.5, 3.0, -math.inf]).unsqueeze(1)
# The walk of the shipped blocks in small: several groups, several blocks a program.
SMALL = {
    "pointers": _blocks.GemmBlocks(16, 64, 32, 2, 1, num_stages=2, num_warps=4, tma=False),
    "descriptors": _blocks.GemmBlocks(16, 64, 32, 2, 3, num_stages=2, num_warps=4, tma=True),
}


@dataclass
class Tile:
    """One tile of words and what the kernels make of it."""

    x: Tensor  # [n, H]
    words: Tensor  # [v, H]
    labels: Tensor  # [n]
    bias: Tensor | None  # [v]
    logit_map: R.LogitMap
    stored: int

    def logits(self) -> Tensor:
        z = self.x.double() @ self.words.double().t()
        z = z if self.bias is None else z + self.bias.double()
        if self.logit_map.softcap is None:
            return z * self.logit_map.factor
        return torch.tanh(z * self.logit_map.logit_scale / self.logit_map.softcap) * (
            self.logit_map.cap
        )

    def run(self, blocks: _blocks.GemmBlocks, fold_cap: bool = False, stats: int = 0) -> Tile:
        n, v = len(self.x), len(self.words)
        scalars = rows_triton.map_scalars(self.logit_map)
        self.target, self.origin = torch.empty(2, n)
        own = self.words[self.labels.clamp(0, v - 1)]
        anchored_target.anchored_target(
            self.x, own, self.labels, self.bias, self.target, self.origin, vocab=v, **scalars
        )
        self.partial = torch.empty(anchored.SUMS.value if stats else 1, -(-v // blocks.v), n)
        self.e = torch.full((self.stored, v + 3), 9.0, dtype=torch.float32)
        e, rows = self.e[:, :v], (self.x, self.words, self.labels, self.bias)
        options = {**scalars, "stats": stats, "fold_cap": fold_cap}
        anchored.anchored_fwd(*rows, self.origin, self.partial, e, 0, blocks, 3, **options)
        self.state, self.total = START.repeat(1, n), torch.ones(n, self.x.shape[1])
        self.anchors = torch.empty(self.stored)
        anchored_fold.anchored_fold(
            *rows, self.partial, self.origin, self.state, e, self.anchors, self.total, 0,
            **options,
        )  # fmt: skip
        self.others = self.state[R.OTHERS]
        assert (self.e[:, v:] == 9.0).all(), "wrote behind the tile"
        self.e = e
        return self


def make_tile(n: int, v: int, H: int, logit_map: R.LogitMap, dtype=torch.float32) -> Tile:
    g = torch.Generator().manual_seed(0)
    x, words = torch.randn(n, H, generator=g), torch.randn(v, H, generator=g) * 0.4
    labels = torch.randint(0, v, (n,), generator=g)
    labels[-1] = v - 1
    bias = torch.randn(v, generator=g)
    return Tile(x.to(dtype), words.to(dtype), labels, bias, logit_map, stored=n * 2 // 3)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("blocks", SMALL)
@pytest.mark.parametrize("shape", [(1, 1, 8), (50, 141, 40), (40, 64, 16)], ids=str)
def test_exponentials_and_their_sums(shape, blocks, logit_map, dtype):
    fold_cap = logit_map == "softcap"
    tile = make_tile(*shape, MAPS[logit_map], dtype).run(SMALL[blocks], fold_cap)
    z, label = tile.logits(), tile.labels.unsqueeze(1)
    true_target = z.gather(1, label).squeeze(1)
    assert max_error(tile.target, true_target) <= 1e-6 * (1 + true_target.abs().max())
    origin = tile.origin.double().unsqueeze(1) * (MAPS[logit_map].cap or MAPS[logit_map].factor)
    e = (z - origin).exp().scatter(1, label, 0.0)
    torch.testing.assert_close(tile.others.double() - 1, e.sum(1), rtol=3e-6, atol=1e-6)
    kept = e * MAPS[logit_map].cap_slope(z) if fold_cap else e
    torch.testing.assert_close(tile.e.double(), kept[: tile.stored], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tile.anchors.double(), origin[: tile.stored, 0], rtol=1e-6, atol=0)
    assert (tile.total == 1).all(), "no row had to be computed again"


def true_sums(tile: Tile, others: Tensor, moment: Tensor, squares: Tensor) -> dict[int, Tensor]:
    """State of the rows after the tile, from what it was beside the origin of now."""
    z, label = tile.logits(), tile.labels.unsqueeze(1)
    own = z.gather(1, label)
    d = z - tile.origin.double().unsqueeze(1) * (tile.logit_map.cap or tile.logit_map.factor)
    e = d.exp().scatter(1, label, 0.0)
    return {
        R.OTHERS: others + e.sum(1),
        R.MOMENT: moment + (e * d).sum(1),
        R.SQUARES: squares + e.square().sum(1),
        R.SUM: 3.0 + z.sum(1),
        R.BEFORE: torch.where((z > own).any(1), math.inf, -math.inf).double(),
    }


@interpreted
@pytest.mark.parametrize("stats", [1, 2, 4, 8, 15])
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("blocks", SMALL)
def test_statistics_in_passing(blocks, logit_map, stats):
    tile = make_tile(50, 141, 40, MAPS[logit_map])
    best = tile.logits().argmax(1)
    tile.labels[:20] = best[:20]
    plain = replace(tile).run(SMALL[blocks])
    tile.run(SMALL[blocks], stats=stats)
    assert torch.equal(tile.others, plain.others) and torch.equal(tile.e, plain.e)
    for row, true in true_sums(tile, *torch.tensor([1.0, -2.0, 0.5])).items():
        bit = {R.MOMENT: 1, R.SQUARES: 2, R.SUM: 4, R.BEFORE: 8}.get(row, stats)
        if not stats & bit:
            true = START[row].expand(50).double()
        size = tile.logits().abs().sum(1).max() if row == R.SUM else 1.0
        torch.testing.assert_close(tile.state[row].double(), true, rtol=5e-6, atol=2e-7 * size)


@interpreted
@pytest.mark.parametrize("logit_map", ["plain", "scaled"])
def test_statistics_of_a_row_that_is_computed_again(logit_map):
    tile = make_tile(40, 130, 24, MAPS[logit_map])
    tile.x *= 0.1
    tile.bias[7] -= 60.0 / MAPS[logit_map].factor
    tile.labels[[3, 20]] = 7
    tile.run(SMALL["pointers"], stats=15)
    # What stood beside the target stands beside the maximum now.
    shift = tile.origin.double() * MAPS[logit_map].factor - tile.target
    assert torch.equal(shift > 30, tile.labels == 7)
    shrink = (-shift).exp()
    true = true_sums(tile, shrink, shrink * (-2 - shift), shrink.square() * 0.5)
    for row in (R.OTHERS, R.MOMENT, R.SQUARES, R.SUM):
        size = tile.logits().abs().sum(1).max() if row == R.SUM else 1.0
        torch.testing.assert_close(tile.state[row].double(), true[row], rtol=3e-5, atol=2e-6 * size)


@interpreted
@pytest.mark.parametrize("blocks", [_blocks.gemm_blocks(False), _blocks.gemm_blocks(True)], ids=str)
def test_the_shipped_blocks(blocks):
    tile = make_tile(130, 300, 72, MAPS["plain"]).run(blocks)
    assert tile.partial.shape == (1, -(-300 // blocks.v), 130)
    z = tile.logits()
    others = (z - z.gather(1, tile.labels.unsqueeze(1))).exp().sum(1) - 1
    torch.testing.assert_close(tile.others.double() - 1, others, rtol=3e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("logit_map", ["plain", "scaled"])
def test_a_row_that_overflows_is_computed_again_and_no_other(logit_map):
    tile = make_tile(70, 130, 24, MAPS[logit_map])
    before = replace(tile).run(SMALL["pointers"])
    for row in (3, 40, 69):  # rows that are stored, and one that is not
        tile.x[row] *= -1e3 * tile.words[tile.labels[row]].sign().sum().sign() + 3e3
        z = tile.logits()[row]
        tile.labels[row] = z.argmin()
    tile.run(SMALL["pointers"])
    again = torch.zeros(70, dtype=torch.bool).index_fill(0, torch.tensor([3, 40, 69]), True)
    assert torch.equal((tile.total != 1).all(1), again)
    assert torch.equal(tile.others[~again], before.others[~again])
    assert torch.equal(tile.e[~again[:46]], before.e[~again[:46]])
    z, factor = tile.logits(), MAPS[logit_map].factor
    origin = tile.origin.double().unsqueeze(1) * factor
    e = (z - origin).exp().scatter(1, tile.labels.unsqueeze(1), 0.0)
    torch.testing.assert_close(origin[again, 0], z[again].amax(1), rtol=1e-5, atol=0)
    # Logits of thousands of nats have float32 roundings of thousands of ulps of 1.
    rtol = z.abs().max().item() * torch.finfo(torch.float32).eps * 2
    torch.testing.assert_close(tile.others[again].double(), e.sum(1)[again], rtol=rtol, atol=1e-6)
    torch.testing.assert_close(tile.e.double(), e[:46], rtol=rtol, atol=1e-6)


@interpreted
@pytest.mark.parametrize("outside", [-100, 200, 2**40])
def test_a_label_outside_the_vocabulary_leaves_finite_exponentials(outside):
    """An ignored row on a GPU: its target is NaN, and its stored zeros times 0 must stay 0."""
    tile = make_tile(20, 200, 8, MAPS["plain"])
    tile.labels[4] = outside
    tile.run(SMALL["descriptors"])
    assert tile.target.isnan().tolist() == [row == 4 for row in range(20)]
    assert tile.e.isfinite().all() and tile.others.isfinite().all()


def count_products(monkeypatch) -> list[str]:
    """Which forward ran: a word for each tile."""
    ran: list[str] = []
    fold, products = walk._Block.fold, fastpo.ops.walks.head.Head.products

    def note(word, function):
        return lambda *args, **named: (ran.append(word), function(*args, **named))[1]

    monkeypatch.setattr(walk._Block, "fold", note("anchored", fold))
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
@pytest.mark.parametrize("frozen", [True, False])
def test_no_logits_tile_is_allocated(monkeypatch, frozen):
    """The float32 tile of the classic forward never exists; a frozen head needs a tile of E."""
    made: list[int] = []
    empty = fastpo.ops.walks.head.Head.empty

    def noted(self, *shape, dtype):
        made.append(math.prod(shape))
        return empty(self, *shape, dtype=dtype)

    monkeypatch.setattr(fastpo.ops.walks.head.Head, "empty", noted)
    monkeypatch.setattr("fastpo.planner.tile_shape", lambda *_: planner.Tiles(32, 64))
    x = make_head(40, 300, 8)
    fastpo.linear_logps(x.hidden.requires_grad_(frozen), x.weight, x.labels, backend="anchored")
    assert max(made) <= (32 * 64 if frozen else 40 * 8)


@interpreted
@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
def test_overflow_in_the_middle_of_the_vocabulary(monkeypatch, mode):
    """Rows move to another origin between tiles: what was summed and kept before moves along."""
    monkeypatch.setattr("fastpo.planner.tile_shape", lambda *_: planner.Tiles(8, 48))
    inputs = make_head(20, 200, 16, bias=True)
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


@interpreted
def test_a_removed_label_has_log_probability_minus_infinity():
    inputs = make_head(3, 40, 8, bias=True)
    inputs.labels[1], inputs.bias[7] = 7, float("-inf")
    inputs.labels[[0, 2]] = 9
    logps = fastpo.linear_logps(
        inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, backend="anchored"
    ).logps
    assert logps.isneginf().tolist() == [False, True, False]


def test_blocks_are_what_the_kernels_can_walk():
    for blocks in (_blocks.gemm_blocks(False), _blocks.gemm_blocks(True), _blocks.repair_blocks()):
        # The tiles of the planner are multiples of 256 words: partial sums are cut alike.
        assert 256 % blocks.v == 0 and blocks.h * 2 % 16 == 0


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
    monkeypatch.setattr(walk, "_is_hopper", lambda device: False)
    last = fastpo.linear_logps(*rows, backend="anchored", **given)
    for name in outputs:
        expected = getattr(last, name)
        allowed = 2e-6 * (1 + expected.abs().max())
        assert all(max_error(getattr(one, name), expected) <= allowed for one in found), name

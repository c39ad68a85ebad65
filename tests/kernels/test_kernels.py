"""The Triton row kernels, tile by tile, judged against float64; interpreted without a GPU.

`linear_logps` on top of them is in test_linear_logps.py, with the other backends.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from _triton import DEVICE, MARKS
from torch import Tensor

from fastpo.ops.rows import backend as R
from fastpo.ops.rows import registry
from fastpo.ops.rows import torch as rows_torch
from fastpo.ops.rows import triton as rows_triton
from fastpo.testing import max_error, rounding

triton = pytest.importorskip("triton")
tl = triton.language

from fastpo.kernels import rows  # noqa: E402

pytestmark = MARKS

# Triton's interpreter truncates what it stores as bfloat16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
MAPS = {
    "plain": R.LogitMap(),
    "scaled": R.LogitMap(temperature=0.7, logit_scale=-1.3),
    "softcap": R.LogitMap(temperature=1.6, softcap=5.0, logit_scale=-0.8),
}
WIDTHS = [(1,), (3,), (70,), (4099,), (64, 70, 1)]  # of the tiles a row is cut into
ALL = sum(R.STATS.values())
STATE = ("MAX", "OTHERS", "TARGET", "MOMENT", "SQUARES", "SUM", "BEFORE")
GRADS = ("SHIFT", "LOG_MASS", "COMMON", "ENTROPY", "LABEL")


@dataclass
class Row:
    """Raw products of n rows, cut into tiles, and what one backend makes of them."""

    products: Tensor  # [n, V] float32
    labels: Tensor  # [n]
    bias: Tensor | None  # [V]
    widths: tuple[int, ...]
    logit_map: R.LogitMap
    state: Tensor = field(init=False)
    kept: list[Tensor] = field(init=False)
    anchors: list[Tensor] = field(init=False)

    def tiles(self) -> list[tuple[int, Tensor]]:
        return [
            (sum(self.widths[:i]), tile)
            for i, tile in enumerate(self.products.split(self.widths, dim=1))
        ]

    def run(self, kernels, stats: int = ALL, dtype: torch.dtype | None = None, fold: bool = False):
        n, _ = self.products.shape
        self.state = torch.tensor(R.INITIAL_STATE, device=DEVICE).unsqueeze(1).repeat(1, n)
        self.kept, self.anchors = [], []
        for first, tile in self.tiles():
            kept = anchors = None
            if dtype is not None:
                kept = torch.empty(tile.shape, dtype=dtype, device=DEVICE)
                anchors = torch.empty(n, device=DEVICE)
                self.kept.append(kept)
                self.anchors.append(anchors)
            kernels.forward(
                tile, first, self.labels, self.bias, self.state, self.logit_map, stats, kept,
                anchors, fold,
            )  # fmt: skip
        return self

    def slope_and_logits(self) -> tuple[Tensor, Tensor]:
        """Of the soft-cap, and z: float64 [n, V]."""
        x = self.products.double()
        if self.bias is not None:
            x = x + self.bias.double()
        if self.logit_map.softcap is None:
            return torch.ones_like(x), x * self.logit_map.factor
        u = torch.tanh(x * self.logit_map.logit_scale / self.logit_map.softcap)
        return 1 - u**2, u * self.logit_map.softcap / self.logit_map.temperature

    def is_label(self) -> Tensor:
        return self.labels.unsqueeze(1) == torch.arange(self.products.shape[1], device=DEVICE)

    def true_state(self) -> Tensor:
        """The definition in rows/backend.py, over whole rows, beside the maximum that was found."""
        z, own = self.slope_and_logits()[1], self.is_label()
        gap = z - self.state[R.MAX].double().unsqueeze(1)
        others = gap.exp().masked_fill(own, 0)
        earlier = own.flip(1).cumsum(1).flip(1).bool() & ~own  # words before the label
        return torch.stack(
            [
                z.amax(1),
                others.sum(1),
                z[own],
                (others * gap.clamp_min(R.LOG_FLOOR)).sum(1),
                others.square().sum(1),
                z.sum(1),
                z.masked_fill(~earlier, float("-inf")).amax(1),
            ]
        )

    def true_kept(self, fold: bool) -> Tensor:
        """exp(z - the last anchor), as `whole_kept` has it; [n, V]."""
        slope, z = self.slope_and_logits()
        e = (z - self.anchors[-1].double().unsqueeze(1)).exp().masked_fill(self.is_label(), 0)
        return e * slope if fold else e

    def whole_kept(self) -> Tensor:
        """All tiles in units of the last anchor, so that a cell counts as it does in its row."""
        shifts = [(a.double() - self.anchors[-1]).exp().unsqueeze(1) for a in self.anchors]
        return torch.cat([e * shift for e, shift in zip(self.kept, shifts, strict=True)], 1)


def make_rows(widths, logit_map=MAPS["plain"], n=3, bias=True, scale=3.0, seed=0) -> Row:
    g = torch.Generator().manual_seed(seed)
    vocab = sum(widths)
    products = torch.randn(n, vocab, generator=g) * scale
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[-1:] = vocab - 1
    offset = torch.randn(vocab, generator=g).to(DEVICE) if bias else None
    return Row(products.to(DEVICE), labels.to(DEVICE), offset, widths, logit_map)


def copy_of(row: Row) -> Row:
    return Row(row.products.clone(), row.labels, row.bias, row.widths, row.logit_map)


def assert_as_good(name, fused, truth, eager, eager_truth, dtype=torch.float32) -> None:
    """The rule of fastpo.testing; each is judged beside the maximum it found itself."""
    error, allowed = max_error(fused, truth), 2 * max_error(eager, eager_truth)
    slack = rounding(truth, dtype)
    assert error <= allowed + slack, f"{name}: {error:.2e}, allowed {allowed:.2e} + {slack:.2e}"


@pytest.mark.parametrize("name", [*STATE, *GRADS, "LOG_FLOOR"])
def test_rows_are_where_the_contract_has_them(name):
    assert getattr(rows, name).value == getattr(R, name)


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_statistics(widths, logit_map):
    # Ten rows: of three, eager is sometimes exact by luck in all.
    row = make_rows(widths, MAPS[logit_map], n=10)
    eager = copy_of(row).run(rows_torch)
    row.run(rows_triton)
    truths = zip(row.true_state(), eager.true_state(), strict=True)
    for i, (truth, eager_truth) in enumerate(truths):
        assert_as_good(STATE[i], row.state[i], truth, eager.state[i], eager_truth)


@pytest.mark.parametrize("stats", [0, *R.STATS.values()])
def test_only_the_requested_statistics_are_written(stats):
    row = make_rows((70, 33), MAPS["scaled"]).run(rows_triton, stats)
    everything = copy_of(row).run(rows_triton).state
    initial = torch.tensor(R.INITIAL_STATE, device=DEVICE)
    bits = {R.MOMENT: 1, R.SQUARES: 2, R.SUM: 4, R.BEFORE: 8}
    for i in range(R.STATE):
        if bits.get(i, 0) & ~stats:
            assert (row.state[i] == initial[i]).all(), i
        else:
            torch.testing.assert_close(row.state[i], everything[i])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_exponentials(dtype, logit_map, fold):
    row = make_rows((70, 300, 1), MAPS[logit_map])
    eager = copy_of(row).run(rows_torch, dtype=dtype, fold=fold)
    row.run(rows_triton, dtype=dtype, fold=fold)
    truth, eager_truth = row.true_kept(fold), eager.true_kept(fold)
    assert_as_good("kept", row.whole_kept(), truth, eager.whole_kept(), eager_truth, dtype)
    assert all(kept.dtype == dtype for kept in row.kept)
    assert torch.equal(row.anchors[-1], row.state[R.MAX] - R.headroom(dtype))


@pytest.mark.parametrize("widths", [(4096,), (8192, 8192), (4099, 1)], ids=str)
def test_same_bits_whatever_is_kept(widths):
    row = make_rows(widths, MAPS["softcap"], n=2)
    scored = row.run(rows_triton).state.clone()
    for dtype in DTYPES:
        for fold in (False, True):
            assert torch.equal(row.run(rows_triton, dtype=dtype, fold=fold).state, scored)


def make_grads(row: Row, seed: int = 1) -> Tensor:
    """[GRADS, n]: the row's own normaliser, and random coefficients."""
    z = row.slope_and_logits()[1]
    grads = torch.randn(R.GRADS, len(z), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    grads[R.SHIFT] = z.amax(1)
    grads[R.LOG_MASS] = torch.logsumexp(z - z.amax(1, keepdim=True), 1)
    return grads


def true_dproducts(row: Row, grads: Tensor, i: int, source: Tensor | None, entropy: bool) -> Tensor:
    """From raw products, or from kept exponentials as they were rounded."""
    (first, tile), g = row.tiles()[i], grads.double().unsqueeze(2)
    cut = slice(first, first + tile.shape[1])
    slope, z = (x[:, cut] for x in row.slope_and_logits())
    if source is not None:
        z = source.double().log() + row.anchors[i].double().unsqueeze(1)
        slope = 1.0
        if row.logit_map.softcap is not None:
            slope = 1 - (z.clamp_min(-row.logit_map.cap) / row.logit_map.cap) ** 2
    log_p = z - g[R.SHIFT] - g[R.LOG_MASS]
    dz = log_p.exp() * g[R.COMMON]
    if entropy:
        dz = dz - log_p.exp() * log_p.clamp_min(R.LOG_FLOOR) * g[R.ENTROPY]
    return torch.where(row.is_label()[:, cut], g[R.LABEL], dz * slope * row.logit_map.factor)


def backward(kernels, row: Row, grads, i, source, entropy, dtype) -> Tensor:
    first, tile = row.tiles()[i]
    out = torch.empty(tile.shape, dtype=dtype, device=DEVICE)
    anchors = None if source is None else row.anchors[i]
    kernels.backward(
        tile if source is None else source, anchors, first, row.labels, row.bias, grads,
        row.logit_map, entropy, out,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["products", "kept"])
def test_dproducts(source, dtype, logit_map, entropy):
    row = make_rows((70, 4099, 1), MAPS[logit_map]).run(rows_torch, dtype=dtype)
    grads = make_grads(row)
    tiles = [
        (row, grads, i, kept if source == "kept" else None, entropy)
        for i, kept in enumerate(row.kept)
    ]
    truth = torch.cat([true_dproducts(*tile) for tile in tiles], 1)
    eager = torch.cat([backward(rows_torch, *tile, dtype) for tile in tiles], 1)
    fused = torch.cat([backward(rows_triton, *tile, dtype) for tile in tiles], 1)
    assert_as_good("dproducts", fused, truth, eager, truth, dtype)


@pytest.mark.parametrize("source", ["products", "kept"])
def test_in_place(source):
    row = make_rows((4099, 70), MAPS["softcap"]).run(rows_triton, dtype=torch.float32)
    other, grads = copy_of(row), make_grads(row)
    state = torch.tensor(R.INITIAL_STATE, device=DEVICE).unsqueeze(1).repeat(1, 3)
    for i, (first, tile) in enumerate(other.tiles()):
        kept = row.kept[i] if source == "kept" else None
        apart = backward(rows_triton, row, grads, i, kept, True, torch.float32)
        anchors = None
        if source == "kept":
            anchors = torch.empty(3, device=DEVICE)
            rows_triton.forward(
                tile, first, row.labels, row.bias, state, row.logit_map, ALL, tile, anchors, False
            )
            assert torch.equal(tile, row.kept[i])
        rows_triton.backward(
            tile, anchors, first, row.labels, row.bias, grads, row.logit_map, True, tile
        )
        assert torch.equal(tile, apart)
    if source == "kept":
        assert torch.equal(state, row.state)


def test_rows_and_states_may_be_slices():
    """As the driver cuts them: rows of a wider buffer, columns of a longer state."""
    row = make_rows((97,), n=4).run(rows_triton, dtype=torch.float16)
    wide = torch.full((6, 120), float("nan"), device=DEVICE)
    wide[1:5, 10:107] = row.products
    state = torch.full((R.STATE, 9), 7.0, device=DEVICE)
    state[:, 2:6] = torch.tensor(R.INITIAL_STATE, device=DEVICE).unsqueeze(1)
    kept = torch.full((6, 101), 5.0, dtype=torch.float16, device=DEVICE)
    anchors = torch.full((3, 8), 5.0, device=DEVICE)
    rows_triton.forward(
        wide[1:5, 10:107], 0, row.labels, row.bias, state[:, 2:6], row.logit_map, ALL,
        kept[2:6, 3:100], anchors[1, 2:6], False,
    )  # fmt: skip
    assert torch.equal(state[:, 2:6], row.state)
    assert torch.equal(kept[2:6, 3:100], row.kept[0])
    assert torch.equal(anchors[1, 2:6], row.anchors[0])
    state[:, 2:6], kept[2:6, 3:100], anchors[1, 2:6] = 7.0, 5.0, 5.0
    assert all((x == x[0, 0]).all() for x in (state, kept, anchors)), "wrote outside its slice"


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    row = make_rows((5, 4), n=n).run(rows_triton, dtype=torch.float32)
    assert row.state.shape == (R.STATE, n)
    assert row.state.isfinite().all()
    out = backward(rows_triton, row, make_grads(row), 0, None, True, torch.float32)
    assert out.isfinite().all()


@pytest.mark.parametrize("outside", [-100, -1, 133, 2**32 + 3, -(2**32) + 3, 2**62])
def test_a_label_outside_the_vocabulary_has_no_target(outside):
    row = make_rows((100, 33)).run(rows_triton)
    poisoned = copy_of(row)
    poisoned.labels = row.labels.clone()
    poisoned.labels[1] = outside
    poisoned.run(rows_triton)
    assert poisoned.state[R.TARGET].isnan().tolist() == [False, True, False]
    assert torch.equal(poisoned.state[:, ::2], row.state[:, ::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at_label", [False, True])
@pytest.mark.parametrize("column", [3, 90])
def test_a_bad_product_shows_in_its_row_only(column, at_label, bad):
    row = make_rows((64, 64), MAPS["plain"])
    row.labels[:] = 100
    good = copy_of(row).run(rows_triton, dtype=torch.float32)
    row.labels = row.labels.clone()
    row.labels[1] = column if at_label else 50
    row.products[1, column] = bad
    row.run(rows_triton, dtype=torch.float32)
    m, others, target = row.state[[R.MAX, R.OTHERS, R.TARGET], 1]
    assert (m - target + others.log()).isnan()  # what the log-probability is made of
    if bad != bad:
        assert m.isnan()
        assert row.kept[1][1].isnan().any()
    assert torch.equal(row.state[:, ::2], good.state[:, ::2])


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_products(scale, logit_map):
    row = make_rows((70, 70), MAPS[logit_map], scale=scale).run(rows_triton, dtype=torch.float16)
    assert row.state[: R.BEFORE].isfinite().all()
    assert all(kept.isfinite().all() for kept in row.kept)
    out = backward(rows_triton, row, make_grads(row), 1, None, True, torch.float32)
    assert out.isfinite().all()


def test_words_that_a_bias_removes():
    """-inf among a row's words, and in whole tiles before and after the others."""
    row = make_rows((40, 40, 40))
    row.labels = row.labels % 20 + 45
    row.bias[:41] = row.bias[70:] = float("-inf")
    row.run(rows_triton, ALL - R.STATS["mean_logits"], dtype=torch.float16)
    left = make_rows((29,))
    left.products, left.bias = row.products[:, 41:70], row.bias[41:70]
    left.labels = row.labels - 41
    left.run(rows_triton, ALL - R.STATS["mean_logits"], dtype=torch.float16)
    torch.testing.assert_close(row.state, left.state, rtol=1e-6, atol=1e-6)
    assert not torch.cat([row.kept[0], row.kept[2]]).any()
    assert torch.equal(row.kept[1][:, 1:30], left.kept[0])
    assert all(anchors.isfinite().all() for anchors in row.anchors)
    out = backward(rows_triton, row, make_grads(left), 0, row.kept[0], True, torch.float32)
    assert not out.any()


def test_tanh_to_the_last_bits():
    @triton.jit
    def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y_ptr + i, rows._tanh(tl.load(x_ptr + i)))

    x = torch.cat([torch.linspace(-12, 12, 12288), torch.logspace(-30, 0, 4091)])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 1e30])
    x = torch.cat([x, special]).to(DEVICE)
    y = torch.empty_like(x)
    kernel[(1,)](x, y, BLOCK=x.numel())
    truth = x.double().tanh()
    assert torch.equal(y.isnan(), truth.isnan())
    error = ((y - truth) / truth.masked_fill(truth == 0, 1)).nan_to_num(0).abs().max()
    assert error <= 2 * torch.finfo(torch.float32).eps


def test_unavailable_says_why(monkeypatch):
    assert "runs on cuda" in rows_triton.unavailable(torch.device("meta"))
    interpreted = rows.rows_fwd_kernel
    compiled = triton.runtime.jit.JITFunction(interpreted.fn)
    monkeypatch.setattr(rows, "rows_fwd_kernel", compiled)
    assert "TRITON_INTERPRET=1" in rows_triton.unavailable(torch.device("cpu"))
    assert "TRITON_INTERPRET=1" in registry.unavailable("anchored", torch.device("cpu"))
    assert "TRITON" not in registry.unavailable("cutlass", torch.device("cpu"))


def test_fastpo_imports_without_triton():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        import fastpo
        from fastpo.ops.rows import triton
        print(triton.unavailable(torch.device("cuda")))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "triton is not installed", result.stderr

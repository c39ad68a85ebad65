"""Products of the head: a library's and our own, in both ways, whatever this processor takes."""

from __future__ import annotations

import math

import pytest
import torch

import fastpo
from fastpo import planner
from fastpo.ops import products
from fastpo.ops.rows.native import DTYPES, compiled
from fastpo.testing import assert_as_good_as_eager

module, _ = compiled()
HERE = () if module is None else module.product_dtypes
OWN = frozenset(dtype for dtype, place in DTYPES.items() if place in HERE)
needs_own = pytest.mark.skipif(not OWN, reason="needs the extension and AVX-512")
needs_bf16 = pytest.mark.skipif(torch.bfloat16 not in OWN, reason="needs AVX-512 with bfloat16")
WAYS = [pytest.param(OWN, marks=needs_own, id="own"), pytest.param(frozenset(), id="library")]
# Blocks are 256 rows, panels 14 by 32, chains 128.
SHAPES = [(1, 1, 1), (5, 7, 3), (14, 32, 128), (15, 33, 129), (100, 257, 300)]
SHAPES += [(300, 40, 31), (513, 31, 700)]
LAYOUTS = [(a, b) for a in (False, True) for b in (False, True)]


def take(monkeypatch, dtypes):
    monkeypatch.setattr(products, "own_dtypes", lambda: dtypes)


@pytest.fixture
def way(request, monkeypatch):
    take(monkeypatch, request.param)


def matrix(rows, columns, transposed=False):
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("a_transposed", "b_transposed"), LAYOUTS)
def test_values(way, shape, a_transposed, b_transposed):
    """In rows that lie farther apart than they are long: what is between them stays."""
    n, v, h = shape
    torch.manual_seed(0)
    a, b = matrix(n, h, a_transposed), matrix(h, v, b_transposed)
    buffer = torch.full((n, v + 3), math.nan)
    out, exact = buffer[:, :v], a.double() @ b.double()
    assert products.mm_(out, a, b) is out
    assert_as_good_as_eager("mm_", out, a @ b, exact)
    own = torch.randn(n, v)
    out.copy_(own)
    products.addmm_(out, a, b)
    assert_as_good_as_eager("addmm_", out, torch.addmm(own, a, b), own.double() + exact)
    products.mm_rows_(out, a, b)
    assert_as_good_as_eager("mm_rows_", out, a @ b, exact)
    assert buffer[:, v:].isnan().all()


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_in_products_of_all_sizes(way, threads):
    torch.manual_seed(0)
    a, b = torch.randn(301, 200), matrix(200, 77, transposed=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = products.mm_rows_(torch.empty(301, 77), a, b)
        for n in (1, 2, 13, 14, 15, 16, 17, 29, 64, 99, 300):
            rows = torch.randperm(301)[:n]
            part = products.mm_rows_(torch.empty(n, 77), a[rows], b)
            assert torch.equal(part, whole[rows]), n
    finally:
        torch.set_num_threads(before)


@needs_own
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_a_row_has_the_same_bits_where_its_terms_are_packed_in_parts(dtype, monkeypatch):
    """The more rows a block has, the fewer terms of each fit; a sum's chains are not cut there."""
    take(monkeypatch, OWN)
    torch.manual_seed(0)
    a, b = torch.randn(200, 3000).to(dtype), torch.randn(3000, 5).to(dtype)
    whole = products.mm_rows_(torch.empty(200, 5), a, b)
    for n in (1, 100, 150):
        assert torch.equal(products.mm_rows_(torch.empty(n, 5), a[:n], b), whole[:n]), n


@needs_own
@pytest.mark.parametrize("shape", [(3, 40, 600), (40, 3, 600), (1100, 700, 10), (600, 900, 300)])
def test_threads_change_no_bit(shape, monkeypatch):
    take(monkeypatch, OWN)
    n, v, h = shape
    a, b = torch.randn(n, h), torch.randn(h, v)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            found.append(products.mm_(torch.empty(n, v), a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_nan_and_infinity_stay_in_their_rows(way):
    a, b = torch.randn(30, 50), torch.randn(50, 40)
    clean = products.mm_(torch.empty(30, 40), a, b)
    a[4, 7], a[20, 49] = math.nan, math.inf
    found = products.mm_(torch.empty(30, 40), a, b)
    others = [i for i in range(30) if i not in (4, 20)]
    assert found[4].isnan().all() and found[20].isinf().all()
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_what_memory_does_not_show(way):
    """A negated view, a repeated row or column, and no terms, no rows or no columns at all."""
    pairs = torch.randn(6, 5, dtype=torch.complex64)
    row = torch.randn(1, 5)
    repeated = [row.expand(6, 5), row.t().expand(5, 6).t(), row[:, :1].expand(6, 5)]
    for a in (pairs.conj().imag, torch._neg_view(torch.randn(6, 5)), *repeated):
        b = torch.randn(5, 4)
        expected = a.double() @ b.double()
        found = products.mm_(torch.empty(6, 4), a, b)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for n, v, h in ((6, 4, 0), (0, 4, 5), (6, 0, 5)):
        out = torch.full((n, v), math.nan)
        assert torch.equal(products.mm_(out, torch.ones(n, h), torch.ones(h, v)), torch.zeros(n, v))


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_by_either(way, mode, dtype):
    """All of a step, beside the same in float64."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 48).to(dtype), (0.3 * torch.randn(5000, 48)).to(dtype)
    labels, upstream = torch.randint(0, 5000, (70,)), torch.randn(70)

    def step(logps_of, dtype):
        h = hidden.to(dtype, copy=True).requires_grad_(mode != "score")
        w = weight.to(dtype, copy=True).requires_grad_(mode in ("keep", "lean"))
        logps = logps_of(h, w)
        if mode != "score":
            (logps * upstream.to(logps.dtype)).sum().backward()
        return {"logps": logps.detach(), "dhidden": h.grad, "dweight": w.grad}

    def fused(h, w):
        budget = 0 if mode == "lean" else None
        return fastpo.linear_logps(h, w, labels, budget=budget).logps

    def eager(h, w):
        logits = (h @ w.t()).to(torch.promote_types(h.dtype, torch.float32))
        return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)

    exact, plain = step(eager, torch.float64), step(eager, dtype)
    for name, found in step(fused, dtype).items():
        if found is not None:
            assert_as_good_as_eager(name, found, plain[name], exact[name])


@needs_bf16
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("a_transposed", "b_transposed"), LAYOUTS)
def test_bfloat16_is_added_up_in_float32(shape, a_transposed, b_transposed, monkeypatch):
    """As good as a product of the same numbers in float32; rounded once where out is bfloat16."""
    take(monkeypatch, OWN)
    n, v, h = shape
    torch.manual_seed(0)
    a, b = matrix(n, h, a_transposed).bfloat16(), matrix(h, v, b_transposed).bfloat16()
    exact, plain = a.double() @ b.double(), a.float() @ b.float()
    out = products.mm_(torch.full((n, v), math.nan), a, b)
    assert_as_good_as_eager("mm_", out, plain, exact)
    rounded = products.mm_(torch.empty(n, v, dtype=torch.bfloat16), a, b)
    assert torch.equal(rounded, out.bfloat16())
    before = rounded.clone()
    products.addmm_(rounded, a, b)
    sums = (before.float() + plain).bfloat16()
    assert_as_good_as_eager("addmm_", rounded, sums, before.double() + exact)
    for rows in (slice(0, 1), slice(n // 2, n)):
        part = products.mm_rows_(torch.empty(len(a[rows]), v), a[rows], b)
        assert torch.equal(part, out[rows])


@needs_own
@pytest.mark.parametrize(
    ("text", "expected"),
    [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), (None, False)],
)
def test_which_processors_take_our_own(text, expected, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text("processor\t: 0\n" + text)
    monkeypatch.setattr(products, "CPU_INFO", path)
    assert products.own_dtypes.__wrapped__() == (OWN if expected else frozenset())


def test_no_operand_is_rounded_to_be_multiplied_on_a_cpu(monkeypatch):
    """Inside autocast of bfloat16, that is; on a GPU it is."""
    take(monkeypatch, {torch.bfloat16, torch.float32})
    wide, narrow = torch.float32, torch.bfloat16
    assert planner.gemm_dtype(narrow, "cpu", narrow, narrow) == narrow
    assert planner.gemm_dtype(narrow, "cpu", narrow, wide) == wide
    assert planner.gemm_dtype(narrow, "cpu", wide, wide) == wide
    assert planner.gemm_dtype(narrow, "cuda", wide, wide) == narrow

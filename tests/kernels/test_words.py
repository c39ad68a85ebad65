"""Kernels over a few words of each row: every backend against float64, by the house's rule.

Of the compiled one every instruction set of this processor runs.
"""

from __future__ import annotations

import pytest
import torch

from fastpo.ops.rows import cpu as rows_cpu
from fastpo.ops.rows import registry
from fastpo.ops.rows.words.backend import WordKernels
from fastpo.testing import assert_as_good_as_eager

OTHERS = [b for b in ("torch", "triton") if not registry.unavailable(b, torch.device("cpu"))]
BACKENDS = [
    *(pytest.param(("cpu", isa), id=name) for isa, name in enumerate(rows_cpu.ISAS)),
    *(pytest.param((name, 0), id=name) for name in OTHERS),
]
N, K, V = 23, 9, 31
# Shorter than a vector, than all chains of them, longer and no multiple.
WIDTHS = (1, 7, 133, 300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> WordKernels:
    backend, isa = request.param
    monkeypatch.setattr(rows_cpu, "ISA", isa)
    return registry.word_kernels(backend)


def problem(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden, weight, ids and coefficients; rows of both matrices are columns of wider buffers."""
    g = torch.Generator().manual_seed(width)
    hidden = torch.randn(N, width + 2, generator=g).to(dtype).float()[:, :width]
    weight = torch.randn(V, width + 3, generator=g).to(dtype)[:, :width]
    ids = torch.randint(-1, V, (N, K), generator=g)
    ids[3] = -1
    ids[:5, 0] = 2  # a word of several rows; others have none
    return hidden, weight, ids, torch.randn(N, K, generator=g)


def whole(ids: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:  # [N, V]
    dense = cells.new_zeros(N, V + 1)
    return dense.scatter_add_(1, ids.where(ids >= 0, V), cells)[:, :V]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(kernels, width, dtype):
    hidden, weight, ids, _ = problem(width, dtype)
    out = torch.full((N, K), 7.0)
    kernels.products(hidden, weight, ids, out)

    def eager(dtype):
        x = hidden.to(dtype) @ weight.to(dtype).t()
        return x.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)

    assert (out[ids < 0] == 0).all()
    assert_as_good_as_eager("products", out, eager(torch.float32), eager(torch.float64))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["tokens", "words"])
def test_sums(kernels, width, dtype, of):
    hidden, weight, ids, cells = problem(width, dtype)
    if of == "tokens":
        rows, index, offsets = weight, ids.flatten(), torch.arange(N + 1) * K
        numbers = cells.flatten()
    else:
        words, order = ids.flatten().sort(stable=True)
        rows, index, numbers = hidden.to(dtype), order // K, cells.flatten()[order]
        offsets = torch.searchsorted(words, torch.arange(V + 1))
    buffer = torch.full((len(offsets) - 1, width + 1), 7.0, dtype=dtype)
    out = buffer[:, :width]
    kernels.sums(numbers, index, offsets, rows, out)
    assert (buffer[:, width] == 7).all(), "wrote behind its rows"

    def eager(dtype):
        dense = whole(ids, cells.to(dtype))
        return dense @ weight.to(dtype) if of == "tokens" else dense.t() @ hidden.to(dtype)

    truth = eager(torch.float64)
    assert_as_good_as_eager("sums", out, eager(torch.float32).to(dtype), truth)


def test_a_word_that_is_not_named_is_not_read(kernels):
    hidden, weight, ids, cells = problem(7, torch.float32)
    weight[4] = float("nan")
    ids[ids == 4] = -1
    out, sums = torch.empty(N, K), torch.empty(N, 7)
    kernels.products(hidden, weight, ids, out)
    kernels.sums(cells.flatten(), ids.flatten(), torch.arange(N + 1) * K, weight, sums)
    assert out.isfinite().all() and sums.isfinite().all()


def test_what_is_no_number_reaches_no_cell_without_a_word(kernels):
    hidden, weight, ids, cells = problem(7, torch.float32)
    out, sums = torch.empty(N, K), torch.empty(N, 7)
    kernels.products(torch.full_like(hidden, float("nan")), weight, ids, out)
    assert torch.equal(out.isnan(), ids >= 0) and (out[ids < 0] == 0).all()
    cells[ids < 0] = float("nan")
    kernels.sums(cells.flatten(), ids.flatten(), torch.arange(N + 1) * K, weight, sums)
    assert sums.isfinite().all()


def test_rows_may_lie_apart(kernels):
    """And have more words than a program takes."""
    hidden, weight, ids, cells = problem(37, torch.float32)
    wide, out, again = torch.full((N, 44), 7.0), torch.empty(N, K), torch.empty(N, 2 * K)
    wide[:, 3:40] = hidden
    kernels.products(hidden, weight, ids, out)
    kernels.products(wide[:, 3:40], weight, ids.repeat(1, 2), again)
    assert torch.equal(again, out.repeat(1, 2))
    given, sums = (cells.flatten(), ids.flatten(), torch.arange(N + 1) * K), torch.empty(N, 37)
    kernels.sums(*given, weight, sums)
    kernels.sums(*given, weight, wide[:, 3:40])
    assert torch.equal(wide[:, 3:40], sums)
    assert (wide[:, :3] == 7).all() and (wide[:, 40:] == 7).all()


def test_nothing_of_nothing(kernels):
    none = torch.zeros(0, dtype=torch.int64)
    kernels.products(torch.ones(3, 4), torch.ones(5, 4), none.view(3, 0), torch.empty(3, 0))
    out = torch.full((2, 4), 7.0)
    kernels.sums(torch.zeros(0), none, torch.zeros(3, dtype=torch.int64), torch.ones(5, 4), out)
    assert (out == 0).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_word_is_read_where_none_is_meant(kernels, width):
    """-1 is not word 0, which may hold what no product takes away."""
    rows, index = torch.full((2, width), float("nan")), torch.full((3,), -1)
    sums, products = torch.full((1, width), 7.0), torch.full((1, 3), 7.0)
    kernels.sums(torch.ones(3), index, torch.tensor([0, 3]), rows, sums)
    kernels.products(torch.ones(1, width), rows, index.view(1, 3), products)
    assert (sums == 0).all() and (products == 0).all()

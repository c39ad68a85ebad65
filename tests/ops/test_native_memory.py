"""Which memory the compiled kernels of a CPU touch: none behind a tensor, any row however far.

Tensors of the first end where a page ends, and nobody may touch the next one: a fault ends the
process. Rows of the second lie more than 2^31 elements apart, in memory that is never filled.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from _pair_problem import make_factors
from torch import Tensor

from fastpo.ops import products
from fastpo.ops.rows import backend as R
from fastpo.ops.rows import cpu as rows_cpu
from fastpo.ops.rows.native import DTYPES, compiled
from fastpo.ops.rows.pair import backend as P
from fastpo.ops.rows.pair import cpu as pair_cpu
from fastpo.ops.rows.words import cpu as words_cpu

module, _ = compiled()
pytestmark = [
    pytest.mark.skipif(module is None, reason="fastpo._C is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does"),
]
ISAS = [pytest.param(isa, id=name) for isa, name in enumerate(rows_cpu.ISAS)]
MAPS = (R.LogitMap(), R.LogitMap(softcap=3.0))
WIDTHS = (1, 9, 39)
FAR = 2**31 + 64
NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on


@pytest.fixture
def isa(request, monkeypatch):
    monkeypatch.setattr(rows_cpu, "ISA", request.param)


def at_the_end(x: Tensor) -> Tensor:
    """The same numbers right before a page that is nobody's."""
    room = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end, size = ctypes.c_void_p(start + room), ctypes.c_size_t(mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(end, size, 0) == 0
    found = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=room - x.nbytes)
    return found.view(x.shape).copy_(x)


def far_apart(x: Tensor) -> Tensor:
    """The same numbers, rows FAR elements apart."""
    size = ((len(x) - 1) * FAR + x.shape[1]) * x.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, (FAR, 1)).copy_(x)


def rows(matrix, vector, v: int, logit_map: R.LogitMap, dtype: torch.dtype) -> list[Tensor]:
    """Everything the kernels of one head write, of two rows."""
    torch.manual_seed(v)
    tile, labels = matrix(torch.randn(2, v)), vector(torch.tensor([v - 1, 0]))
    state = vector(torch.tensor(R.INITIAL_STATE).unsqueeze(1).repeat(1, 2))
    kept, anchors = matrix(torch.zeros(2, v, dtype=dtype)), vector(torch.zeros(2))
    bias, grads = vector(torch.randn(v)), vector(torch.randn(R.GRADS, 2))
    every = sum(R.STATS.values())
    rows_cpu.forward(tile, 0, labels, bias, state, logit_map, every, kept, anchors, False)
    outs = [matrix(torch.zeros(2, v, dtype=dtype)) for _ in range(3)]
    rows_cpu.backward(tile, None, 0, labels, bias, grads, logit_map, True, outs[0])
    for entropy, out in enumerate(outs[1:]):
        rows_cpu.backward(kept, anchors, 0, labels, None, grads, logit_map, bool(entropy), out)
    return [state, kept, *outs]


def pairs(matrix, vector, v: int, logit_map: R.LogitMap, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(v)
    student, teacher = (
        P.Side(matrix(torch.randn(2, v)), vector(torch.randn(v)), logit_map) for _ in range(2)
    )
    sides, rule = (student, teacher), P.Rule("jsd", 0.3)
    state = vector(torch.tensor(P.INITIAL_STATE).unsqueeze(1).repeat(1, 2))
    pair_cpu.softmaxes(sides, 0, state, 0, True)
    constants, sums = vector(torch.ones(P.CONSTANTS, 2)), torch.zeros(P.SUMS, 2).double()
    pair_cpu.values(sides, 0, constants, rule, sums)
    factors = vector(make_factors(2))
    outs = [matrix(torch.zeros(2, v, dtype=dtype)) for _ in range(4)]
    pair_cpu.gradients(sides, 0, constants, factors, rule, (outs[0], outs[1]))
    factors[P.GRAD] = 0.0
    pair_cpu.gradients(sides, 0, constants, factors, rule, (outs[2].fill_(7), outs[3].fill_(7)))
    return [state, sums, *outs]


def words(matrix, vector, v: int, _: R.LogitMap, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(v)
    hidden, weight = matrix(torch.randn(2, v)), matrix(torch.randn(2, v).to(dtype))
    ids = vector(torch.tensor([[0, 1, -1], [1, 1, 0]]))
    out, sums = vector(torch.zeros(2, 3)), matrix(torch.zeros(2, v, dtype=dtype))
    words_cpu.products(hidden, weight, ids, out)
    numbers, offsets = vector(torch.randn(6)), vector(torch.tensor([0, 3, 6]))
    words_cpu.sums(numbers, ids.flatten(), offsets, weight, sums)
    return [out, sums]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", [rows, pairs, words])
def test_row_kernels(isa, kernels, dtype):
    for v in WIDTHS:
        for logit_map in MAPS:
            plain = kernels(Tensor.clone, Tensor.clone, v, logit_map, dtype)
            ends = kernels(at_the_end, at_the_end, v, logit_map, dtype)
            far = kernels(far_apart, Tensor.clone, v, logit_map, dtype)
            for expected, at_end, apart in zip(plain, ends, far, strict=True):
                assert torch.equal(expected, at_end) and torch.equal(expected, apart)


@pytest.mark.parametrize("transposed", [(a, b) for a in (False, True) for b in (False, True)])
def test_products(transposed):
    """Panels that are not full, of rows and of columns, and a pair of terms that is not."""
    assert module is not None
    for dtype in (dtype for dtype, place in DTYPES.items() if place in module.product_dtypes):
        for n, v, h in ((2, 3, 5), (2, 33, 17), (2, 7, 1)):
            torch.manual_seed(0)
            a, b = torch.randn(n, h).to(dtype), torch.randn(h, v).to(dtype)
            expected = products._own(torch.empty(n, v), a, b, add=False)
            for place in (at_the_end, far_apart):
                own = (
                    place(x.t().contiguous()).t() if turned else place(x)
                    for x, turned in zip((a, b), transposed, strict=True)
                )
                assert torch.equal(
                    products._own(place(torch.zeros(n, v)), *own, add=False), expected
                )

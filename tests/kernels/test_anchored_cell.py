"""What the epilogue adds up: Triton's against float64, and CUTLASS's, compiled for the host."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastpo import planner
from fastpo.kernels import _blocks, anchored, anchored_target

CSRC = Path(__file__).parents[2] / "csrc"
SUMS = """
#define __host__
#define __device__
#define __forceinline__ inline
#include "anchored_cell.cuh"
extern "C" void add_up(const float* products, const float* bias, const float* base,
                       const int* labels, float slope, int n, int v, float* sums) {
  // Columns go on to a multiple of what one visit of a thread sees.
  const int width = fastpo::kAnchoredVisit, end = (v + width - 1) / width * width;
  for (int i = 0; i < n * end; ++i) {
    const int row = i / end, column = i % end, left = column / width * width;
    float u = column < v ? products[row * v + column] : 0.0f;
    if (bias != nullptr && column < v) u += bias[column];
    float d = fastpo::anchored_exponent(u, slope, base[row]), e = fastpo::power_of_two(d);
    if (bias != nullptr || fastpo::any_special(left, width, labels[row], v))
      fastpo::mask_special(u, d, e, column == labels[row], column < v);
    const float parts[] = {e, e * d, e * e, u};
    for (int s = 0; s < 4; ++s) sums[s * n + row] += parts[s];
    float& largest = sums[4 * n + row];
    largest = column == 0 || d > largest ? d : largest;
  }
}
"""


def truth(z: Tensor, origin: Tensor, labels: Tensor, factor: float) -> Tensor:
    """Sums in float64 of e, e·log2 e and e² over the others, and of u over all words."""
    z, d = z.double(), z.double() - origin.double().unsqueeze(1)
    e = d.exp().masked_fill(torch.arange(z.shape[1]) == labels.unsqueeze(1), 0)
    moment = torch.where(e == 0, 0, e * d / math.log(2))
    return torch.stack([e.sum(1), moment.sum(1), e.square().sum(1), z.sum(1) / factor])


BLOCKS = _blocks.GemmBlocks(16, 64, 32, 2, 1, num_stages=2, num_warps=4, tma=False)


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="float32 products are for the CPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("factor", [1.0, -0.8])
def test_the_same_sums_as_in_triton(factor, biased, tmp_path):
    library, (n, v, H) = tmp_path / "cells.so", (50, 141, 8)
    command = ["c++", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}/cuda", f"-I{CSRC}/include"]
    subprocess.run(
        [*command, "-x", "c++", "-", "-o", str(library)], input=SUMS, text=True, check=True
    )
    g = torch.Generator().manual_seed(0)
    x, words = torch.randn(n, H, generator=g), torch.randn(v, H, generator=g)
    bias, labels = torch.randn(v, generator=g), torch.randint(0, v, (n,), generator=g)
    bias[9], labels[labels == 9] = -math.inf * factor, 8  # a word with e = 0
    bias = bias if biased else None
    products = x @ words.t()
    z = (products if bias is None else products + bias) * factor
    labels[:20] = z.argmax(1)[:20]
    origin = z.gather(1, labels.unsqueeze(1)).squeeze(1) / factor
    labels[30] = -100  # a label that is not in the tile
    base = origin * factor / math.log(2)
    expected, sums = torch.empty(5, -(-v // BLOCKS.v), n), torch.zeros(5, n)
    anchored.anchored_fwd(
        x, words, labels, bias, base, expected, None, BLOCKS, 3, factor=factor, stats=15
    )
    columns = labels.int()
    places = [0 if t is None else t.data_ptr() for t in (products, bias, base, columns)]
    given = [ctypes.c_void_p(place) for place in places]
    sizes = (ctypes.c_float(factor / math.log(2)), n, v, ctypes.c_void_p(sums.data_ptr()))
    ctypes.CDLL(str(library)).add_up(*given, *sizes)
    torch.testing.assert_close(sums[:4], expected[:4].sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[:4].double(), truth(z, origin * factor, labels, factor),
                               rtol=1e-5, atol=1e-4)  # fmt: skip
    torch.testing.assert_close(sums[4], expected[4].amax(0), rtol=1e-5, atol=1e-4)
    assert (sums[4] > 0).any() and (sums[4, :20] < 0).all()


def summed(x: Tensor, words: Tensor, labels: Tensor) -> Tensor:  # [4, n], beside 0
    partial = torch.empty(5, -(-len(words) // BLOCKS.v), len(x))
    anchored.anchored_fwd(
        x, words, labels, None, torch.zeros(len(x)), partial, None, BLOCKS, 3, factor=1.0, stats=15
    )
    return partial[:4].sum(1)


@pytest.mark.parametrize("label", [0, 63, 64, 127, 128, 140])
def test_a_label_at_an_edge_of_a_block_of_words(label):
    """One row: for another's label the block would be looked at cell by cell."""
    g, labels = torch.Generator().manual_seed(0), torch.tensor([label])
    x, words = torch.randn(1, 8, generator=g), torch.randn(141, 8, generator=g)
    expected = truth(x @ words.t(), torch.zeros(1), labels, 1.0)
    torch.testing.assert_close(summed(x, words, labels).double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_and_words_may_lie_among_others():
    """Of a hidden size of no whole steps, where no product takes away what is behind."""
    g, labels = torch.Generator().manual_seed(0), torch.arange(20)
    apart = torch.full((162, 70), math.nan)
    apart[:-1, 8:48] = torch.randn(161, 40, generator=g)
    x, words = apart[:20, 8:48], apart[20:-1, 8:48]
    expected = summed(x.contiguous(), words.contiguous(), labels)
    assert torch.equal(summed(x, words, labels), expected) and expected.isfinite().all()


def test_a_label_s_product_is_rounded_once():
    g, labels = torch.Generator().manual_seed(0), torch.arange(20)
    wide, words = torch.randn(20, 2600, generator=g), torch.randn(20, 2500, generator=g)
    x, (target, origin, base) = wide[:, 50:-50], torch.empty(3, 20)
    anchored_target.anchored_target(x, words, labels, None, target, origin, base, factor=1.0)
    assert torch.equal(target, (x.double() * words).sum(1).float())
    assert torch.equal(origin, target)


def test_blocks_are_what_the_kernels_can_walk():
    for blocks in (_blocks.gemm_blocks(False), _blocks.gemm_blocks(True), _blocks.repair_blocks()):
        # Blocks of E are multiples of a granule, and no block of the product reaches beyond one.
        assert planner.GRANULE % blocks.v == 0 and blocks.h * 2 % 16 == 0

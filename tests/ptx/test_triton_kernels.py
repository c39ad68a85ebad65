"""The first minutes on a GPU, without one: Triton's kernels, compiled for it, against float64.

What is asked is benchmarks/gpu_smoke.py's, of small heads.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from _ask import HERE, invariant, kernels, passed, run

# Prints how many variants of kernels are asked for, of which none is compiled.
ASKED_FOR = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import pathlib, torch, triton
from _gpu import emulate
gpu = emulate(pathlib.Path("nowhere"))
import fastpo
from fastpo import planner

asked = set()
triton.runtime.JITFunction._do_compile = lambda kernel, key, *_: asked.add((kernel.__name__, key))
planner.tile_shape = lambda tokens, *_: planner.Tiles(min(tokens, 64), 256)

def call(kept):
    x, w = (torch.randn(n, 64).requires_grad_() for n in (200, 600))
    stats = fastpo.linear_logps(
        x, w, torch.zeros(200).long(), outputs=("logps", "entropy"), temperature=torch.ones(200),
        budget=4 * 600 * kept, backend="triton",
    )
    grads = torch.ones(2, 201)[:, kept % 2 :][:, :200]  # parts of another tensor
    torch.autograd.grad((stats.logps, stats.entropy), (x, w), tuple(grads))

with gpu.mode():
    for kept in (128, 130, 129, 131, 66, 63):
        call(kept)
        print(len(asked))
"""


@pytest.mark.parametrize(
    ("backend", "capability", "every", "expected"),
    [
        ("anchored", 90, 17, {"anchored_fwd_tma_kernel", "anchored_fwd_kernel"}),
        ("anchored", 80, 23, {"anchored_fwd_kernel", "anchored_fold_kernel"}),
        ("triton", 90, 13, {"rows_fwd_kernel", "rows_bwd_kernel", "finish_kernel"}),
    ],
)
def test_smoke(backend, capability, every, expected):
    assert kernels(backend, every, "--capability", capability) >= expected


def test_a_token_has_the_same_bits_in_batches_of_all_sizes():
    """The interpreter cannot tell: Triton lays a sum out by what it knows of the sizes."""
    assert invariant("anchored") == 2


def test_what_is_no_number_stays():
    """The interpreter cannot tell: its plain maximum keeps a NaN, which a GPU's passes over."""
    assert passed("kernels/test_kernels.py", "bad_product") == 8


def test_a_block_of_rows_may_start_anywhere():
    """Nothing is compiled again because of where the tokens that are not kept begin."""
    counts = run("-c", ASKED_FOR).split()
    assert len(counts) == 6 and counts[0] != "0" and len(set(counts)) == 1

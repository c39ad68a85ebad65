"""Tile sizes, all of them."""

from __future__ import annotations

from typing import NamedTuple

import triton

# Arguments of kernels that change from batch to batch. A kernel that knew them to be
# multiples of 16 could add up a row in another order, and be compiled anew for every other batch.
BATCH_SIZES = (
    "n", "k", "count", "stored", "row", "rows", "height", "stride_sum", "stride_partial",
    "stride_state", "stride_grads", "stride_constants", "stride_sums", "stride_factors",
)  # fmt: skip

# One number a row, or a few, from where a block of rows starts: a kernel that knew this place to be
# a multiple of 16 bytes would be compiled anew where it is none.
ROW_NUMBERS = (
    "labels_ptr", "base_ptr", "origin_ptr", "offset_ptr", "target_ptr", "others_ptr", "own_ptr",
    "before_ptr", "anchors_ptr", "inverse_ptr", "state_ptr", "grads_ptr", "g_logps_ptr",
    "g_entropy_ptr", "g_lse_ptr",
)  # fmt: skip
PER_BATCH = {"do_not_specialize": BATCH_SIZES, "do_not_specialize_on_alignment": ROW_NUMBERS}


class Blocks(NamedTuple):
    v: int  # columns one step of a program covers
    num_warps: int


def row_blocks(width: int) -> Blocks:
    """For all row kernels over a tile of `width` columns, or over one of each of two heads.

    Depends on nothing but the width: the order of a row's sums, hence every bit of its
    log-probability, must not change with the number of rows, the dtype kept, or the mode.
    """
    # Eight warps hold 4,096 columns in 40 registers a thread, so an H100's SM runs 6 programs and
    # has 96 KiB of loads in flight, where 4.8 TB/s at 700 ns want 25. All statistics at once need
    # 80 registers, two heads at most 109 (their gradients); 8,192 columns spill there. (Compile
    # report, sm_90; no time measured yet.)
    v = min(max(triton.next_power_of_2(width), 32), 4096)
    return Blocks(v, num_warps=max(v // 512, 1))


class GemmBlocks(NamedTuple):
    m: int  # rows of the block one program holds
    v: int  # its columns: words
    h: int  # one step along the hidden size
    group: int  # blocks of rows that share their words before the next words are read
    halvings: int  # of the columns, until the epilogue takes them part by part
    num_stages: int
    num_warps: int
    tma: bool  # persistent, loaded through descriptors


def gemm_blocks(tma: bool, crowded: bool = False) -> GemmBlocks:
    """For the product with exponentials in its epilogue. No GPU timing has chosen these yet.

    crowded: statistics are summed of products with a bias. Depends on nothing else, because `v` is
    how partial sums are cut, and parts of columns the order of their sums: see `row_blocks`.
    """
    if tma:
        # sm_90: 170 registers, 238 when E is stored, at most 255 with statistics; no spills. Shared
        # memory 200,736 B of 232,448: a fifth stage of 49,152 does not fit. Parts of 16 columns: of
        # 8 a row of E is half a sector, but with a bias and statistics 16 spill. A cell takes 4.8
        # instructions, 10 where E is stored, 8.3 and 13.4 with what TRL's trainers ask for.
        return GemmBlocks(128, 256, 64, 8, 5 if crowded else 4, num_stages=4, num_warps=8, tma=True)
    # At most 254 registers (sm_100, all statistics of products with a bias); no spills; 49,152 B of
    # shared memory, 65,552 on sm_100.
    return GemmBlocks(128, 128, 32, 8, 2, num_stages=4, num_warps=8, tma=False)


def repair_blocks() -> GemmBlocks:
    """For rows that are computed again: rare, and beside sums that want many small programs."""
    # At most 204 registers where rows start at multiples of 16 bytes; no spills; 12,304 B of shared
    # memory.
    return GemmBlocks(64, 32, 32, 1, 0, num_stages=2, num_warps=4, tma=False)

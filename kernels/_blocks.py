"""Tile sizes, all of them."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Blocks(NamedTuple):
    v: int  # columns one step of a program covers
    num_warps: int


def row_blocks(width: int) -> Blocks:
    """For both row kernels over a tile of `width` columns.

    Depends on nothing but the width: the order of a row's sums, hence every bit of its
    log-probability, must not change with the number of rows, the dtype kept, or the mode.
    """
    # Eight warps hold 4,096 columns in 40 registers a thread, so an H100's SM runs 6 programs and
    # has 96 KiB of loads in flight, where 4.8 TB/s at 700 ns want 25. All statistics at once need
    # 80 registers; 8,192 columns spill there. (Compile report, sm_90; no time measured yet.)
    v = min(max(triton.next_power_of_2(width), 32), 4096)
    return Blocks(v, num_warps=max(v // 512, 1))

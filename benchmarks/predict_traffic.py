"""Of benchmarks/predict.py: bytes moved by kernels that touch less than all they are given.

A function takes a kernel's arguments by name and its grid.
"""

from __future__ import annotations

from collections.abc import Callable

from predict_cutlass import ASSUMED
from torch import Tensor


def size(x: Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.dtype.itemsize


def _fold_traffic(a: dict, grid: tuple[int, ...]) -> int:
    """With maxima only rows out of range are looked at: none, here."""
    if a["maxima_ptr"] is not None:
        return 4 * a["n"]
    sums = 4 * a["blocks"] * a["n"] * a["WANTED"].bit_count()
    cells = 0 if a["e_ptr"] is None else a["stored"] * a["e_ptr"].itemsize
    return sums + 8 * a["n"] + size(a["origin_ptr"]) + size(a["state_ptr"]) + cells


def _product_traffic(a: dict, grid: tuple[int, ...]) -> int:
    moved = sum(size(a[f"{x}_desc"].base) for x in "xw") if "x_desc" in a else 0
    moved += sum(size(a.get(f"{x}_ptr")) for x in ("x", "w", "labels", "bias", "base"))
    if a["partial_ptr"] is not None:
        moved += 4 * a["partial_ptr"].shape[1] * a["n"] * a["WANTED"].bit_count()
    return moved + (0 if a["e_ptr"] is None else a["stored"] * a["vocab"] * a["e_ptr"].itemsize)


def _target_traffic(a: dict, grid: tuple[int, ...]) -> int:
    return 2 * size(a["x_ptr"]) + size(a["labels_ptr"]) + 12 * len(a["labels_ptr"])


def _rescale_traffic(a: dict, grid: tuple[int, ...]) -> int:
    moved = 2 * size(a["total_ptr"]) * ASSUMED["of the rows with a new maximum in a tile"]
    return int(moved) + size(a["before_ptr"]) + size(a["anchors_ptr"])


def _label_traffic(a: dict, grid: tuple[int, ...]) -> int:
    return size(a["labels_ptr"]) + 2 * size(a["own_ptr"])


TRAFFIC: dict[str, Callable[[dict, tuple[int, ...]], int]] = {
    "anchored_fwd_kernel": _product_traffic,
    "anchored_fwd_tma_kernel": _product_traffic,
    "anchored_fold_kernel": _fold_traffic,
    "anchored_again_kernel": lambda a, grid: 4 * a["n"] * grid[1],
    "anchored_target_kernel": _target_traffic,
    "anchored_label_kernel": _label_traffic,
    "rescale_kernel": _rescale_traffic,
}

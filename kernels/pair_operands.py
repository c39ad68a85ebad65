"""What the three kernels of pair_rows.py are launched with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ._blocks import row_blocks
from .rows import FIXED_ROUNDING, _check_unit_columns


class PairSide(NamedTuple):
    """One head's part of a tile."""

    tile: Tensor  # [n, v] float32
    bias: Tensor | None  # [V] float32
    scale: float  # inside the soft-cap's tanh
    post: float  # z = post·x, or post·tanh(scale·x)
    inverse: Tensor | None  # [n] float64, multiplies z of each row
    softcap: bool
    factor: float  # dz/dx without the soft-cap and `inverse`


class PairTerms(NamedTuple):
    """A divergence's kind, and what its terms are made of; see _terms."""

    kind: int
    s_weight: float
    t_weight: float
    scale: float


Sides = tuple[PairSide, PairSide]


def operands(sides: Sides, first: int) -> dict[str, object]:
    """What all three kernels read the tiles with."""
    for side in sides:
        _check_unit_columns(side.tile, side.bias, side.inverse)
    found: dict[str, object] = {"width": sides[0].tile.shape[1]}
    for name, side in zip(("s", "t"), sides, strict=True):
        found[f"{name}_ptr"] = side.tile
        found[f"{name}_stride"] = side.tile.stride(0)
        found[f"{name}_bias_ptr"] = None if side.bias is None else side.bias[first:]
        found[f"{name}_inverse_ptr"] = side.inverse
        found[f"{name}_scale"], found[f"{name}_post"] = side.scale, side.post
        found[f"{name.upper()}_SOFTCAP"] = side.softcap
    return found


def terms_of(terms: PairTerms) -> dict[str, object]:
    return {"KIND" if name == "kind" else name: x for name, x in terms._asdict().items()}


def launch(width: int) -> dict[str, int]:
    blocks = row_blocks(width)
    return {"BLOCK_V": blocks.v, "num_warps": blocks.num_warps, **FIXED_ROUNDING}

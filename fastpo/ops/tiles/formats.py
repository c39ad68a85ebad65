"""Formats of quantised weights that are plain tensors, as checkpoints and engines store them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..walks.checks import DTYPES, check_integer, check_kind, check_number, given, shape_of

_NVFP4_BLOCK = 16
_EIGHT_BITS = (
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def _e2m1(codes: Tensor) -> Tensor:
    """float32 numbers of four bits: sign, two bits of exponent, one of mantissa.

    Computed: a table made on the host would wait for the device.
    """
    exponent, half = (codes >> 1) & 3, (codes & 1).float() / 2
    size = torch.where(exponent == 0, half, torch.ldexp(1 + half, exponent - 1))
    return torch.where(codes >> 3 == 1, -size, size)


@dataclass(frozen=True, eq=False)
class BlockScaled:
    """values·scale, one scale for each block of [rows, columns]: float8 or int8 weights.

    stored: [V, H] float8 or int8.  scales: [⌈V/rows⌉, ⌈H/columns⌉] of a floating dtype, which
    float8 is and its bytes as integers are not; one axis or both may be 1, for all.
    block: (rows, columns); DeepSeek's float8 has (128, 128), a scale per word (1, H).
    dtype: of the tiles; products and scales are float32 until then.
    """

    stored: Tensor
    scales: Tensor
    block: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_kind(stored=self.stored, scales=self.scales)
        _check_matrix(self.stored, self.dtype)
        if self.stored.dtype not in _EIGHT_BITS:
            raise ValueError(f"stored: expected dtype int8 or float8, got {self.stored.dtype}")
        self._check_block()
        _check_scales(self.stored, self.scales)
        sizes = zip(self.stored.shape, self.block, strict=True)
        expected = tuple(-(-size // one) for size, one in sizes)
        allowed = zip(self.scales.shape, expected, strict=False)
        if self.scales.dim() != 2 or not all(have in (1, want) for have, want in allowed):
            raise ValueError(f"scales: expected shape {expected}, got {shape_of(self.scales)}")

    def _check_block(self) -> None:
        def counts(x: Any) -> bool:
            return not isinstance(x, bool) and isinstance(x, Integral) and int(x) >= 1

        pair = isinstance(self.block, (tuple, list)) and len(self.block) == 2
        if not pair or not all(map(counts, self.block)):
            raise ValueError(
                f"block: expected (rows, columns), two integers >= 1, got {self.block!r}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.stored)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def tile(self, v0: int, v1: int) -> Tensor:
        words, H = self.stored[v0:v1].float(), self.shape[1]
        (rows, columns), (down, across) = self.block, self.scales.shape
        scales = self.scales
        if down > 1:
            first = v0 // rows
            own = scales[first : -(-v1 // rows)].repeat_interleave(rows, 0)
            scales = own[v0 - first * rows :][: v1 - v0]
        if across > 1:
            scales = scales.repeat_interleave(columns, 1)[:, :H]
        return words.mul_(scales.float()).to(self.dtype)


@dataclass(frozen=True, eq=False)
class NVFP4:
    """Pairs of E2M1 numbers, a float8 scale for 16 of a word's, and one float32 scale for all.

    stored: [V, H/2] uint8, the lower four bits first.  scales: [V, H/16] float8_e4m3fn, row by row,
    or these numbers in float32, bfloat16 or float16.
    scale: what multiplies them, a number or a tensor of one; where a checkpoint has what they are
    divided by, as compressed-tensors' `weight_global_scale`, its reciprocal.
    """

    stored: Tensor
    scales: Tensor
    scale: float | Tensor
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_kind(stored=self.stored, scales=self.scales)
        _check_matrix(self.stored, self.dtype)
        if self.stored.dtype != torch.uint8:
            raise ValueError(f"stored: expected dtype torch.uint8, got {self.stored.dtype}")
        _check_scales(self.stored, self.scales, (torch.float8_e4m3fn, *DTYPES))
        self._check_scale()
        V, H = self.shape
        if H % _NVFP4_BLOCK or shape_of(self.scales) != (V, H // _NVFP4_BLOCK):
            expected = (V, -(-H // _NVFP4_BLOCK))
            raise ValueError(f"scales: expected shape {expected}, got {shape_of(self.scales)}")

    def _check_scale(self) -> None:
        scale = self.scale
        if not isinstance(scale, Tensor):
            check_number("scale", scale, "a finite number or a tensor of one")
            return
        check_kind(scale=scale)
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(
                "scale: expected a number or a floating-point tensor of one, "
                f"got {scale.dtype} of shape {shape_of(scale)}"
            )
        # PyTorch takes a scalar on a CPU beside any device.
        if scale.device != self.device and (scale.dim() or scale.device.type != "cpu"):
            raise ValueError(f"scale: expected device {self.device}, got {scale.device}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], 2 * self.stored.shape[1]

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def tile(self, v0: int, v1: int) -> Tensor:
        packed = self.stored[v0:v1]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).int()  # [v1 - v0, H]
        words = _e2m1(codes)
        scale = self.scale.reshape(()) if isinstance(self.scale, Tensor) else float(self.scale)
        scales = self.scales[v0:v1].float() * scale
        words = words.view(*scales.shape, _NVFP4_BLOCK) * scales.unsqueeze(-1)
        return words.flatten(1).to(self.dtype)


@dataclass(frozen=True, eq=False)
class PackedIntegers:
    """(integer - zero point)·scale, integers of 2, 4 or 8 bits as compressed-tensors packs them.

    stored: [V, ⌈H·bits/32⌉] int32, the lowest bits first, each integer plus 2^(bits-1).
    scales: [V, G], one for each group of ⌈H/G⌉ of a word's.  zero_points: [V, G], unpacked.
    """

    stored: Tensor
    scales: Tensor
    bits: int
    hidden: int  # H: the last numbers of a word may be none
    zero_points: Tensor | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_kind(stored=self.stored, scales=self.scales, **given(zero_points=self.zero_points))
        _check_matrix(self.stored, self.dtype)
        if self.stored.dtype != torch.int32:
            raise ValueError(f"stored: expected dtype torch.int32, got {self.stored.dtype}")
        check_integer("bits", self.bits, "2, 4 or 8", lambda x: x in (2, 4, 8))
        check_integer("hidden", self.hidden, "H >= 1", lambda x: x >= 1)
        V, columns = self.stored.shape[0], -(-self.hidden * self.bits // 32)
        if self.stored.shape[1] != columns:
            raise ValueError(f"stored: expected shape {(V, columns)}, got {shape_of(self.stored)}")
        _check_scales(self.stored, self.scales)
        shape = shape_of(self.scales)
        if len(shape) != 2 or shape[0] != V or not 1 <= shape[1] <= self.hidden:
            raise ValueError(f"scales: expected shape ({V}, G), got {shape_of(self.scales)}")
        points = self.zero_points
        if points is not None and points.shape != self.scales.shape:
            raise ValueError(f"zero_points: expected shape {shape}, got {shape_of(points)}")
        if points is not None and points.device != self.device:
            raise ValueError(f"zero_points: expected device {self.device}, got {points.device}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.hidden

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def tile(self, v0: int, v1: int) -> Tensor:
        places = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.device)
        codes = self.stored[v0:v1].unsqueeze(-1).bitwise_right_shift(places)
        codes = codes.bitwise_and(2**self.bits - 1).flatten(1)[:, : self.hidden]
        words = (codes - 2 ** (self.bits - 1)).float()
        if self.zero_points is not None:
            words -= self._columns(self.zero_points[v0:v1])
        return words.mul_(self._columns(self.scales[v0:v1])).to(self.dtype)

    def _columns(self, groups: Tensor) -> Tensor:  # [n, G] -> [n, H] float32
        size = -(-self.hidden // groups.shape[1])
        return groups.float().repeat_interleave(size, 1)[:, : self.hidden]


def _check_matrix(stored: Tensor, dtype: torch.dtype) -> None:
    if stored.dim() != 2 or 0 in stored.shape:
        raise ValueError(f"stored: expected shape (V, H), got {shape_of(stored)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")


def _check_scales(
    stored: Tensor, scales: Tensor, dtypes: tuple[torch.dtype, ...] | None = None
) -> None:
    """dtypes: None: any floating one. Bytes of a float8 read as integers would be other numbers."""
    if not scales.is_floating_point() or (dtypes is not None and scales.dtype not in dtypes):
        names = ", ".join(str(x).removeprefix("torch.") for x in dtypes or ())
        expected = f"one of {names}" if dtypes else "a floating one"
        raise ValueError(f"scales: expected dtype {expected}, got {scales.dtype}")
    if scales.device != stored.device:
        raise ValueError(f"scales: expected device {stored.device}, got {scales.device}")

"""The anchored product on CUTLASS: tensors to the addresses that csrc/cuda/anchored.cu takes."""

from __future__ import annotations

import torch
from torch import Tensor

from .architecture import is_hopper
from .native import compiled

_C, _MISSING = compiled()

# Of sums, as the kernel cuts rows and words.
_ROWS, _WORDS = 128, 256
_ALIGNMENT = 16  # bytes, of what the hardware copies as blocks


def unavailable(device: torch.device) -> str | None:
    if _C is None:
        return _MISSING
    if not _C.has_cutlass:
        return "fastpo._C was built without CUTLASS; see csrc/cuda/cuda.cmake"
    if not is_hopper(device):
        return f"runs on devices of compute capability 9.0, got {device}"
    return None


def serves(x: Tensor, words: Tensor, bias: Tensor | None) -> bool:
    """All rows, those of e too, start where blocks can be copied.

    The same whether e is wanted or not, so that all modes have the same bits.
    """
    if x.dtype != torch.bfloat16 or words.dtype != torch.bfloat16:
        return False
    starts = [t.data_ptr() for t in (x, words, bias) if t is not None]
    pitches = [t.stride(0) * t.itemsize for t in (x, words)] + [len(words) * x.itemsize]
    return not any(place % _ALIGNMENT for place in starts + pitches)


def product(
    x: Tensor,  # [n, H] bfloat16
    words: Tensor,  # [v, H] bfloat16
    columns: Tensor,  # [n] int32, column of each row's label, outside [0, v) where it is not here
    bias: Tensor | None,  # [v] float32
    origin: Tensor,  # [n] float32
    e: Tensor | None,  # [stored, v] bfloat16, written: of the first rows
    slope: float,
    sums: int,  # the first one alone, or all
    multiprocessors: int,
) -> Tensor:  # [sums, blocks of words, n] float32
    """Row sums of e = exp2((x·words + bias - origin)·slope) and statistics, see anchored.h."""
    assert _C is not None, _MISSING
    n, v, stored = len(x), len(words), 0 if e is None else len(e)
    blocks = -(-v // _WORDS)
    found = x.new_empty(sums, blocks, n, dtype=torch.float32)
    for a, b in ((0, stored), (stored, n)):
        if a == b:
            continue
        whole = -(-(b - a) // _ROWS) * _ROWS
        partial = x.new_empty(sums, blocks, whole, dtype=torch.float32)
        work = _C.AnchoredTile(
            x=x[a:b].data_ptr(),
            x_stride=x.stride(0),
            words=words.data_ptr(),
            words_stride=words.stride(0),
            n=b - a,
            v=v,
            h=x.shape[1],
            columns=columns[a:b].data_ptr(),
            origin=origin[a:b].data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            slope=slope,
            sums=sums,
            partial=partial.data_ptr(),
            e=0 if a == stored or e is None else e.data_ptr(),
            e_stride=0 if e is None else e.stride(0),
        )
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            _C.anchored_cuda(work, stream.device_index, multiprocessors, stream.cuda_stream)
        if b - a == n:
            return partial[:, :, :n]
        found[:, :, a:b] = partial[:, :, : b - a]
    return found

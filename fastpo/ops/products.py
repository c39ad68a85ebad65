"""Products, added up in float32: a library's, or on some processors that of csrc/cpu/product.cpp.

On a CPU PyTorch multiplies float32 by MKL, which has AVX-512 for Intel's processors alone, and
rounds products of bfloat16. On AMD's that have AVX-512 fastpo's own takes about half the time, and
of bfloat16, where the processor multiplies that, a quarter.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .rows.native import DTYPES, compiled

# A library's product of fewer rows than its kernel takes at once, or of a rest of them, rounds in
# another order: a token's bits would depend on how many there are.
ROWS = 16
_WORDS = 4096  # that become float32 at once
CPU_INFO = Path("/proc/cpuinfo")  # of Linux


def mm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a·b, in the dtype of out: float32, or that of a and b."""
    if _is_own(a):
        return _own(out, a, b, add=False)
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a·b, in the dtype of out: float32, or that of a and b."""
    if _is_own(a):
        _own(out, a, b, add=True)
    elif out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def mm_rows_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`mm_`, on a CPU with the same bits in a row whatever rows are beside it."""
    if a.device.type != "cpu" or _is_own(a):
        return mm_(out, a, b)
    whole = len(a) // ROWS * ROWS
    if whole:
        mm_(out[:whole], a[:whole], b)
    if whole < len(a):
        rest = a.new_zeros(ROWS, a.shape[1])
        rest[: len(a) - whole] = a[whole:]
        out[whole:] = torch.mm(rest, b)[: len(a) - whole]
    return out


def wide_products(hidden: Tensor, weight: Tensor) -> Tensor:  # [N, V] float32
    """hidden·weightᵀ of 16 bits, not rounded again; on a CPU of `weight` as it is stored."""
    out = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    own = _is_own(hidden) and weight.dtype == hidden.dtype
    if own or hidden.device.type == "cuda":
        return mm_(out, hidden, weight.to(hidden.dtype).t())
    hidden = hidden.float()
    # A few words at a time: no float32 copy of the weight.
    for words, part in zip(weight.split(_WORDS), out.split(_WORDS, 1), strict=True):
        mm_(part, hidden, words.float().t())
    return out


def _is_own(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype in own_dtypes()


def _own(out: Tensor, a: Tensor, b: Tensor, add: bool) -> Tensor:
    if not a.numel() or not b.numel():
        return out if add else out.zero_()
    if out.dtype == torch.float32 and out.stride(1) == 1:
        _multiply(out, _readable(a), _readable(b), add)
        return out
    sums = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    if add:
        sums.copy_(out)
    _multiply(sums, _readable(a), _readable(b), add)
    return out.copy_(sums)


def _readable(x: Tensor) -> Tensor:
    """With neighbours in memory, and the sign that memory has."""
    return (x if 1 in x.stride() else x.contiguous()).resolve_neg()


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    module, missing = compiled()
    assert module is not None, missing
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    work = module.Product(
        dtype=DTYPES[a.dtype],
        a=a.data_ptr(),
        a_row=a.stride(0),
        a_column=a.stride(1),
        b=b.data_ptr(),
        b_row=b.stride(0),
        b_column=b.stride(1),
        n=a.shape[0],
        v=b.shape[1],
        h=a.shape[1],
        out=out.data_ptr(),
        out_stride=out.stride(0),
        add=add,
    )
    module.product_cpu(work, torch.get_num_threads())


@functools.cache
def own_dtypes() -> frozenset[torch.dtype]:
    """Of operands whose product on a CPU is our own.

    Known by the processor, not by a clock: two runs on one machine have the same bits.
    """
    module, _ = compiled()
    if module is None or _vendor() != "AuthenticAMD":
        return frozenset()
    return frozenset(dtype for dtype, place in DTYPES.items() if place in module.product_dtypes)


def _vendor() -> str | None:
    """Of the processor; None where nobody says it."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), None)

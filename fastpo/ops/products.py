"""Products, added up in float32: a library's, or on some processors that of csrc/cpu/product.cpp.

On a CPU PyTorch multiplies float32 by MKL, which has AVX-512 for Intel's processors alone. On AMD's
that have it, fastpo's own product takes about half the time.
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
CPU_INFO = Path("/proc/cpuinfo")  # of Linux


def mm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a·b, in the dtype of out: float32, or that of a and b."""
    if _is_own(out, a, b):
        _own(out, a, b, add=False)
        return out
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a·b, in the dtype of out: float32, or that of a and b."""
    if _is_own(out, a, b):
        _own(out, a, b, add=True)
    elif out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def mm_rows_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`mm_`, on a CPU with the same bits in a row whatever rows are beside it."""
    if a.device.type != "cpu" or _is_own(out, a, b):
        return mm_(out, a, b)
    whole = len(a) // ROWS * ROWS
    if whole:
        mm_(out[:whole], a[:whole], b)
    if whole < len(a):
        rest = a.new_zeros(ROWS, a.shape[1])
        rest[: len(a) - whole] = a[whole:]
        out[whole:] = torch.mm(rest, b)[: len(a) - whole]
    return out


def _is_own(out: Tensor, a: Tensor, b: Tensor) -> bool:
    if a.device.type != "cpu" or not own_is_faster():
        return False
    served = {x.dtype for x in (out, a, b)} == {torch.float32} and a.numel() and b.numel()
    return bool(served) and out.stride(1) == 1 and 1 in a.stride() and 1 in b.stride()


def _own(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    module, missing = compiled()
    assert module is not None, missing
    a, b = a.resolve_neg(), b.resolve_neg()  # which memory does not show
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
def own_is_faster() -> bool:
    """Known by the processor, not by a clock: two runs on one machine have the same bits."""
    module, _ = compiled()
    mkl = torch.backends.mkl.is_available()
    return module is not None and module.product_dtypes and mkl and _vendor() == "AuthenticAMD"


def _vendor() -> str | None:
    """Of the processor; None where nobody says it."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), None)

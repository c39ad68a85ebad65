"""What the rows of anchored.py are taken beside: the product with each row's label, before others.

Reads two rows of H per token and writes three numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH
from .rows import FIXED_ROUNDING, LOG2_E


@triton.jit(**PER_BATCH)
def anchored_target_kernel(
    x_ptr,  # [n, H]
    w_ptr,  # [vocab, H]
    labels_ptr,  # [n] int64
    bias_ptr,  # [vocab] float32, or None
    target_ptr,  # [n] float32, written: z of the label, NaN where it is not in the vocabulary
    origin_ptr,  # [n] float32, written: the label's product, with its bias
    base_ptr,  # [n] float32, written: its exponent to the base of 2
    H,
    vocab,
    stride_x,
    stride_w,
    factor,
    slope,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + n)
    inside = (label >= 0) & (label < vocab)
    w_ptr += tl.where(inside, label, 0) * stride_w
    # float64: an error here shifts the whole row. Where the label comes from the same products as
    # the other words, their errors are alike and cancel; these would not.
    parts = tl.zeros((BLOCK_H,), tl.float64)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + n * stride_x + h, mask=h < H, other=0.0).to(tl.float64)
        parts += x * tl.load(w_ptr + h, mask=h < H, other=0.0).to(tl.float64)
    acc = tl.sum(parts, 0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + label, mask=inside, other=0.0)
    z = acc * factor
    # Without a label (an ignored row), or beside one that a bias of -inf removes, any finite origin
    # will do; +inf can only be an error.
    origin = tl.where(z == float("inf"), float("nan"), acc)
    origin = tl.where(inside & (z != -float("inf")), origin, 0.0)
    tl.store(target_ptr + n, tl.where(inside, z, float("nan")))
    tl.store(origin_ptr + n, origin)
    tl.store(base_ptr + n, origin * slope)


def anchored_target(
    x: Tensor,  # [n, H]
    w: Tensor,  # [vocab, H]
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [vocab] float32
    target: Tensor,  # [n] float32, written: z of the label
    origin: Tensor,  # [n] float32, written
    base: Tensor,  # [n] float32, written
    *,
    factor: float,  # z = factor·products
) -> None:
    n, H = x.shape
    with torch.cuda.device_of(x):
        anchored_target_kernel[(n,)](
            x,
            w,
            labels,
            bias,
            target,
            origin,
            base,
            H,
            len(w),
            x.stride(0),
            w.stride(0),
            factor,
            factor * LOG2_E.value,
            BLOCK_H=1024,
            num_warps=4,
            **FIXED_ROUNDING,
        )

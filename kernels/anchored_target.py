"""What the rows of anchored.py are taken beside: z of each row's label, before all other words.

Reads two rows of H per token and writes two numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .anchored import _u
from .rows import FIXED_ROUNDING


@triton.jit
def anchored_target_kernel(
    x_ptr,  # [n, H]
    own_ptr,  # [n, H] the word of each row's label
    labels_ptr,  # [n] int64
    bias_ptr,  # [vocab] float32, or None
    target_ptr,  # [n] float32, written: z of the label, NaN where it is not in the vocabulary
    origin_ptr,  # [n] float32, written: u of the label
    H,
    vocab,
    stride_x,
    stride_own,
    scale,
    post,
    SOFTCAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    # float64: an error here shifts the whole row. Where the label comes from the same products as
    # the other words, their errors are alike and cancel; these would not.
    parts = tl.zeros((BLOCK_H,), tl.float64)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + n * stride_x + h, mask=h < H, other=0.0).to(tl.float64)
        w = tl.load(own_ptr + n * stride_own + h, mask=h < H, other=0.0).to(tl.float64)
        parts += x * w
    acc = tl.sum(parts, 0).to(tl.float32)
    label = tl.load(labels_ptr + n)
    inside = (label >= 0) & (label < vocab)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + label, mask=inside, other=0.0)
    u = _u(acc, scale, SOFTCAP)
    z = u * post
    # Without a label (an ignored row), or beside one that a bias of -inf removes, any finite origin
    # will do; +inf can only be an error.
    origin = tl.where(z == float("inf"), float("nan"), u)
    origin = tl.where(inside & (z != -float("inf")), origin, 0.0)
    tl.store(target_ptr + n, tl.where(inside, z, float("nan")))
    tl.store(origin_ptr + n, origin)


def anchored_target(
    x: Tensor,  # [n, H]
    own: Tensor,  # [n, H] the word of each row's label; any where the label is no word
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] float32
    target: Tensor,  # [n] float32, written: z of the label
    origin: Tensor,  # [n] float32, written
    *,
    vocab: int,
    scale: float,  # inside the soft-cap's tanh
    post: float,  # z = post·x, or post·tanh(scale·x)
    softcap: bool,
) -> None:
    n, width = x.shape
    with torch.cuda.device_of(x):
        anchored_target_kernel[(n,)](
            x,
            own,
            labels,
            bias,
            target,
            origin,
            width,
            vocab,
            x.stride(0),
            own.stride(0),
            scale,
            post,
            SOFTCAP=softcap,
            BLOCK_H=1024,
            num_warps=4,
            **FIXED_ROUNDING,
        )

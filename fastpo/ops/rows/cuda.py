"""Row kernels of csrc/cuda, on the current stream of the tile's device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as R
from . import torch as eager
from .architecture import too_old
from .native import backward_tile, compiled, forward_tile

_C, _MISSING = compiled()


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"expected a CUDA tensor, got device {device}"
    if _C is None:
        return _MISSING
    if not _C.has_cuda:
        return (
            "fastpo._C was built without CUDA; with nvcc on the PATH `pip install .` builds it with"
        )
    return too_old(device)


def forward(
    tile: Tensor,  # [n, v] float32
    first: int,
    labels: Tensor,  # [n]
    bias: Tensor | None,  # [V]
    state: Tensor,  # [STATE, n]
    logit_map: R.LogitMap,
    stats: int,
    kept: Tensor | None,  # [n, v]
    anchors: Tensor | None,  # [n]
    fold_cap: bool,
) -> None:
    assert _C is not None, _MISSING
    work = forward_tile(tile, first, labels, bias, state, logit_map, stats, kept, anchors, fold_cap)
    with torch.cuda.device(tile.device):
        stream = torch.cuda.current_stream()
        _C.rows_forward_cuda(work, stream.device_index, stream.cuda_stream)


def backward(
    source: Tensor,  # [n, v]
    anchors: Tensor | None,  # [n]
    first: int,
    labels: Tensor,  # [n]
    bias: Tensor | None,  # [V]
    grads: Tensor,  # [GRADS, n]
    logit_map: R.LogitMap,
    entropy_grad: bool,
    out: Tensor,  # [n, v]
) -> None:
    assert _C is not None, _MISSING
    work = backward_tile(source, anchors, first, labels, bias, grads, logit_map, entropy_grad, out)
    with torch.cuda.device(source.device):
        stream = torch.cuda.current_stream()
        _C.rows_backward_cuda(work, stream.device_index, stream.cuda_stream)


rescale = eager.rescale  # where there is no Triton; that skips rows whose anchor stayed
finish = eager.finish
row_grads = eager.row_grads

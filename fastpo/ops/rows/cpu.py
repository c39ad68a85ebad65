"""Row kernels of csrc/cpu: a row per thread at a time, vectors as wide as the processor has them.

AVX-512 or AVX2 on x86-64, NEON on 64-bit ARM, one float at a time elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as R
from . import torch as eager
from .native import backward_tile, compiled, forward_tile

_C, _MISSING = compiled()

# Instruction sets that were compiled and that this processor has, scalar first.
ISAS: tuple[str, ...] = () if _C is None else _C.cpu_isas
ISA = len(ISAS) - 1  # the best; tests lower it


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"expected a CPU tensor, got device {device}"
    return None if _C is not None else _MISSING


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
    _C.rows_forward_cpu(work, torch.get_num_threads(), ISA)


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
    _C.rows_backward_cpu(work, torch.get_num_threads(), ISA)


rescale = eager.rescale  # of few blocks of tokens, beside products that take far longer
finish = eager.finish
row_grads = eager.row_grads

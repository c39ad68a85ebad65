"""Products of each token with a few words of its own, without a [N, K, H] copy of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .derivatives import check_plain, first_derivatives
from .saving import stays

_CELLS = 4 * 2**20  # elements of the rows gathered at once


def picked_products(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [N, K] int64 in [0, V)
) -> Tensor:  # [N, K] float32
    """<hidden_n, weight[ids_nk]>, with gradient into both, accumulated in float32."""
    with stays():
        found: Tensor = _Picked.apply(hidden, weight, ids)
    return found


def _chunks(ids: Tensor, width: int) -> Iterator[slice]:
    step = max(1, _CELLS // max(1, ids.shape[1] * width))
    return (slice(a, a + step) for a in range(0, len(ids), step))


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        out = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(ids, hidden.shape[1]):
                words = weight[ids[part]].float()  # [n, K, H]
                out[part] = (words @ hidden[part].float().unsqueeze(-1)).squeeze(-1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_plain("linear_topk_divergence", (grad,))
        hidden, weight, ids = ctx.saved_tensors
        need_hidden, need_weight, _ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = None
        if need_weight:
            dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for part in _chunks(ids, hidden.shape[1]):
            g = grad[part].unsqueeze(-1)  # [n, K, 1]
            if dhidden is not None:
                dhidden[part] = (g * weight[ids[part]].float()).sum(1).to(hidden.dtype)
            if dweight is not None:
                rows = g * hidden[part].float().unsqueeze(1)
                dweight.index_add_(0, ids[part].flatten(), rows.flatten(0, 1))
        dweight = None if dweight is None else dweight.to(weight.dtype)
        sources = (grad, hidden, weight)
        return *first_derivatives("linear_topk_divergence", (dhidden, dweight), sources), None

"""Products of each token with a few words of its own, with gradient into both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rows import registry
from ..tiles.tiled import Tiled
from .anchored import unit_columns
from .checks import check_memory
from .derivatives import check_plain, first_derivatives
from .saving import stays


def picked_products(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [N, K] int64 in [0, V)
) -> Tensor:  # [N, K] float32
    """<hidden_n, weight[ids_nk]>, accumulated in float32, and so are both gradients."""
    if isinstance(weight, Tiled):
        words, ids = ids.unique(return_inverse=True)
        weight = weight.index_select(0, words)
    operands = unit_columns(hidden), unit_columns(weight), ids.contiguous()
    with stays():
        return _run(*operands)


@torch.compiler.disable
def _run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    check_memory(hidden=hidden)
    found: Tensor = _Picked.apply(hidden, weight, ids)
    return found


def sums_by_word(
    backend: str, coefficients: Tensor, ids: Tensor, rows: Tensor, out: Tensor
) -> None:
    """out_v = Σ coefficients_nk·rows_n over the cells with ids_nk = v; ids [N, K], out [V, H]."""
    n, k = ids.shape
    tokens = torch.arange(n, dtype=torch.int64, device=ids.device).repeat_interleave(k)
    cells = sorted_by_word(coefficients.flatten(), ids.flatten(), tokens, len(out))
    registry.word_kernels(backend).sums(*cells, rows, out)


def sorted_by_word(
    coefficients: Tensor, ids: Tensor, tokens: Tensor, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients and tokens of all cells, word by word, and where each word begins, [V + 1].

    Tokens of a word stay in their order, so that sums over them have the same bits each time.
    """
    words, order = ids.sort(stable=True)
    edges = torch.arange(vocab + 1, dtype=torch.int64, device=ids.device)
    return coefficients[order], tokens[order], torch.searchsorted(words, edges)


def sums_by_token(
    backend: str, coefficients: Tensor, ids: Tensor, weight: Tensor, out: Tensor
) -> None:
    """out_n = Σ_k coefficients_nk·weight[ids_nk]; ids [N, K], out [N, H]."""
    n, k = ids.shape
    offsets = torch.arange(n + 1, dtype=torch.int64, device=ids.device) * k
    given = coefficients.flatten(), ids.flatten(), offsets
    registry.word_kernels(backend).sums(*given, weight, out)


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        out = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        kernels = registry.word_kernels(registry.choose(None, hidden.device))
        with torch.autocast(hidden.device.type, enabled=False):  # which rounds PyTorch's products
            kernels.products(hidden.float(), weight, ids, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_plain("linear_topk_divergence", (grad,))
        hidden, weight, ids = ctx.saved_tensors
        backend = registry.choose(None, hidden.device)
        dhidden = dweight = None
        if ctx.needs_input_grad[0]:
            dhidden = torch.empty_like(hidden)
            sums_by_token(backend, grad, ids, weight, dhidden)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            sums_by_word(backend, grad, ids, hidden, dweight)
        sources = (grad, hidden, weight)
        return *first_derivatives("linear_topk_divergence", (dhidden, dweight), sources), None

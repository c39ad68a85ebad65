"""The slow twin of every primitive: plain PyTorch, any dtype, full logits. Truth in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.linear_logps import TokenStats


def linear_logps(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...] int64 in [0, V) or ignore_index
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
) -> TokenStats:
    """All statistics of `fastpo.linear_logps`, in the dtype of the inputs, by autograd."""
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        ignored = labels == ignore_index
    index = labels.masked_fill(ignored, 0).unsqueeze(-1)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    # A word of probability 0 adds nothing to the entropy; p·log p would be 0·inf for it.
    plogp = torch.where(p > 0, p * log_p.clamp_min(torch.finfo(z.dtype).min), torch.zeros_like(p))
    own, lse = z.gather(-1, index), torch.logsumexp(z, -1)
    word = torch.arange(z.shape[-1], device=z.device)
    beaten = torch.where(word < index, z >= own, z > own).any(-1)
    stats = {
        "logps": log_p.gather(-1, index).squeeze(-1),
        "entropy": -plogp.sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "mean_logits": z.mean(-1),
        "is_top1": ~beaten & ~lse.isnan(),
        "lse": lse,
    }
    return TokenStats(**{name: x.masked_fill(ignored, 0) for name, x in stats.items()})

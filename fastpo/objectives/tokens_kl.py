"""Pairs, token level, with a KL or entropy over the whole vocabulary per position. Family "tokens".

`l_t` is the log-ratio of a token, `kl_t` the full-vocabulary KL(ref || pi) at its position, in
nats; `Σ_m` sums over scored positions. All return [B].
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from ._math import masked_sum
from ._parameters import NonNegative, OneOf, Positive
from ._registry import objective


@objective(
    "sparse_po",
    paper="arXiv:2410.05102",
    family="tokens",
    gradient_into=(
        "chosen_token_weights",
        "rejected_token_weights",
        "chosen_kl_weights",
        "rejected_kl_weights",
    ),
)
def sparse_po(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    ref_chosen_token_logps: Tensor,  # [B, T] nats
    ref_rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_token_weights: Tensor,  # [B, T] sparse, learned
    rejected_token_weights: Tensor,  # [B, T]
    chosen_token_kl: Tensor,  # [B, T] nats
    rejected_token_kl: Tensor,  # [B, T] nats
    chosen_kl_weights: Tensor | None = None,  # [B, T], the token weights without
    rejected_kl_weights: Tensor | None = None,  # [B, T]
    *,
    beta: Annotated[float, Positive] = 0.1,
    lambda_u: Annotated[float, NonNegative] = 0.001,
    lambda_d: Annotated[float, NonNegative] = 0.001,
) -> Tensor:  # [B] nats
    """-log σ(β·(u - (D_rejected - D_chosen))) + λ_u·|w|₁ + λ_d·|k|₁, norms over both sides.

    u = Σ_m w_t·l_t of chosen minus that of rejected, D = Σ_m k_t·kl_t; gradient into w and k.
    """
    chosen_kl = chosen_token_weights if chosen_kl_weights is None else chosen_kl_weights
    rejected_kl = rejected_token_weights if rejected_kl_weights is None else rejected_kl_weights
    chosen = chosen_token_weights * (chosen_token_logps - ref_chosen_token_logps)
    rejected = rejected_token_weights * (rejected_token_logps - ref_rejected_token_logps)
    # Per side one sum: reward and its KL have the same mask.
    won = masked_sum(chosen + chosen_kl * chosen_token_kl, chosen_mask)
    lost = masked_sum(rejected + rejected_kl * rejected_token_kl, rejected_mask)
    norm_u = masked_sum(chosen_token_weights.abs(), chosen_mask)
    norm_u = norm_u + masked_sum(rejected_token_weights.abs(), rejected_mask)
    norm_d = masked_sum(chosen_kl.abs(), chosen_mask) + masked_sum(rejected_kl.abs(), rejected_mask)
    return -F.logsigmoid(beta * (won - lost)) + lambda_u * norm_u + lambda_d * norm_d


@objective("tdpo", paper="arXiv:2404.11999", family="tokens")
def tdpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_token_kl: Tensor,  # [B, T] nats
    rejected_token_kl: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, NonNegative] = 0.5,
    version: Annotated[int, OneOf(1, 2)] = 2,
) -> Tensor:  # [B] nats
    """-log σ(β·(Δ - α·(K_rejected - sg(K_chosen)))), K = Σ_m kl_t per side.

    version 1 has α = 1 whatever is given, and a gradient into K_chosen.
    """
    chosen = masked_sum(chosen_token_kl, chosen_mask)
    rejected = masked_sum(rejected_token_kl, rejected_mask)
    drift = rejected - chosen if version == 1 else alpha * (rejected - chosen.detach())
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - drift))

"""Policy gradient: clipped and weighted ratios of [N, T] log-probabilities. All return [N].

`w` is the ratio pi/old of a token or of the whole row: exp⁺(x_t), exp⁺(mean_t x_t), or
("sequence_token") the value of the second with the gradient of log pi_t; x_t = logp_t - old_t, and
without old the ratio is 1, with gradient. The policy term is multiplied by is_weights; β·k3(ref_t -
logp_t), times w if unbiased_kl, is added per token; entropy_coef times the mean entropy of all
scored tokens is subtracted, whatever is_weights are (TRL averages over those of its entropy mask
alone). A row without scored tokens gives 0.

Siblings of the family: `policy_gradient_weights`, `policy_gradient_sequence`,
`policy_gradient_values`.
"""

from functools import partial

from torch import Tensor

from ._math import masked_mean, masked_sum
from ._policy import (
    Batch,
    Coefficient,
    Epsilon,
    Level,
    MaxLength,
    NumTokens,
    OptionalBound,
    OptionalEpsilon,
    Penalties,
    clipped,
    token_mean,
)
from ._registry import objective


@objective("grpo", paper="arXiv:2402.03300")
def grpo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    epsilon_low: Epsilon = 0.2,
    epsilon_high: OptionalEpsilon = None,
    delta: OptionalBound = None,
    level: Level = "token",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """Mean over the row of -min(min(w, delta)·A, clamp(w, 1 - ε_low, 1 + ε_high)·A).

    epsilon_high None: epsilon_low; delta None: no bound outside the clip. Advantages come from
    group_advantages. The paper has beta 0.04; TRL has unbiased_kl.
    """
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )
    term = partial(clipped, low=epsilon_low, high=epsilon_high, delta=delta)
    return batch.rows(term, masked_mean, level, Penalties(beta, unbiased_kl, entropy_coef))


@objective("bnpo", paper="arXiv:1707.06347", aliases=("ppo",))
def bnpo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    epsilon_low: Epsilon = 0.2,
    epsilon_high: OptionalEpsilon = None,
    delta: OptionalBound = None,
    level: Level = "token",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """grpo with the mean over all scored tokens of the batch; PPO's policy term.

    With advantages [N, T] it is PPO; ppo_value is its critic.
    """
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )
    term = partial(clipped, low=epsilon_low, high=epsilon_high, delta=delta)
    return batch.rows(term, token_mean, level, Penalties(beta, unbiased_kl, entropy_coef))


@objective("dr_grpo", paper="arXiv:2503.20783")
def dr_grpo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    max_length: MaxLength = None,
    epsilon_low: Epsilon = 0.2,
    epsilon_high: OptionalEpsilon = None,
    delta: OptionalBound = None,
    level: Level = "token",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """grpo with Σ_t / max_length in place of the mean; max_length None: T.

    Advantages of scale "none".
    """
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )
    length = max_length or max(token_logps.shape[1], 1)

    def fixed(tokens: Tensor, mask: Tensor) -> Tensor:
        return masked_sum(tokens, mask) / length

    term = partial(clipped, low=epsilon_low, high=epsilon_high, delta=delta)
    return batch.rows(term, fixed, level, Penalties(beta, unbiased_kl, entropy_coef))


@objective("dapo", paper="arXiv:2503.14476")
def dapo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    num_tokens: NumTokens = None,
    epsilon_low: Epsilon = 0.2,
    epsilon_high: OptionalEpsilon = 0.28,
    delta: OptionalBound = None,
    level: Level = "token",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """bnpo with Σ_t over num_tokens, the scored tokens of the global batch per process.

    None: the scored tokens at hand; below 1 counts as 1. May be a 0-d tensor.
    """
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )
    term = partial(clipped, low=epsilon_low, high=epsilon_high, delta=delta)
    return batch.rows(
        term,
        partial(token_mean, num_tokens=num_tokens),
        level,
        Penalties(beta, unbiased_kl, entropy_coef),
    )


@objective("luspo", paper="arXiv:2602.05261")
def luspo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    epsilon_low: Epsilon = 0.2,
    epsilon_high: OptionalEpsilon = None,
    delta: OptionalBound = None,
    level: Level = "sequence",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """grpo with one ratio per row, and the sum over the row in place of the mean."""
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )
    term = partial(clipped, low=epsilon_low, high=epsilon_high, delta=delta)
    return batch.rows(term, masked_sum, level, Penalties(beta, unbiased_kl, entropy_coef))


@objective("gspo", paper="arXiv:2507.18071")
def gspo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    epsilon_low: Epsilon = 0.0003,
    epsilon_high: OptionalEpsilon = 0.0004,
    delta: OptionalBound = None,
    level: Level = "sequence",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """grpo with one ratio per row, the geometric mean of its tokens'."""
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )
    term = partial(clipped, low=epsilon_low, high=epsilon_high, delta=delta)
    return batch.rows(term, masked_mean, level, Penalties(beta, unbiased_kl, entropy_coef))

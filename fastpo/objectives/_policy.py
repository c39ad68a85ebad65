"""What the policy-gradient entries share: the ratio, the KL and entropy terms, the reductions.

An entry is a policy term, a function of (ratio, advantages), and a reduction of tokens to rows:

    p_t   = term(w, A)_t · is_weights_t + β·k3(ref_t - logp_t)
    row_i = reduce(p)_i - entropy_coef · token mean of the entropy

Both may be [N, 1] where ratio and advantages are: masked sums and means spread them over the row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ._math import exp_cap, k3, masked_mean, masked_sum
from ._parameters import Interval, NonNegative, OneOf, Positive

Level = Annotated[str, OneOf("token", "sequence", "sequence_token")]
Epsilon = Annotated[float, NonNegative]
OptionalEpsilon = Annotated[float | None, NonNegative]
OptionalBound = Annotated[float | None, Positive]
NumTokens = float | int | None  # bare: a 0-d tensor may be given, its value is not read
MaxLength = Annotated[int | None, Interval(1, float("inf"), "[)")]
Coefficient = Annotated[float, NonNegative]

Term = Callable[[Tensor, Tensor], Tensor]  # (ratio, advantages) -> p_t
Reduction = Callable[[Tensor, Tensor], Tensor]  # (p [N, T] or [N, 1], mask [N, T]) -> [N]


def per_token(x: Tensor) -> Tensor:
    """[N] -> [N, 1]; [N, T] stays."""
    return x[:, None] if x.ndim == 1 else x


def either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers in like's dtype; torch.where of two floats would round to float32."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def token_mean(x: Tensor, mask: Tensor, num_tokens: float | Tensor | None = None) -> Tensor:
    """[N] rows whose mean is Σ of everything / max(D, 1); D = num_tokens or all scored tokens."""
    if isinstance(num_tokens, Tensor):
        tokens: float | Tensor = num_tokens.clamp(min=1)
    elif num_tokens is None:
        tokens = mask.sum().clamp(min=1)
    else:
        tokens = max(num_tokens, 1)
    return mask.shape[0] * masked_sum(x, mask) / tokens


def log_ratios(token_logps: Tensor, old_token_logps: Tensor | None) -> Tensor:
    """[N, T] logp - old; on-policy, without old, 0 with the gradient of logp."""
    return token_logps - (token_logps.detach() if old_token_logps is None else old_token_logps)


def required(name: str, value: Tensor | None, option: str, setting: float) -> Tensor:
    """The optional quantity that a hyperparameter asks for."""
    if value is None:
        raise ValueError(f"{name}: expected a tensor with {option} = {setting}, got None")
    return value


def clipped(
    ratio: Tensor,
    advantages: Tensor,
    *,
    low: float,
    high: float | None,
    delta: float | None = None,
) -> Tensor:
    """-min(min(w, delta)·A, clamp(w, 1 - low, 1 + high)·A); high None: low."""
    inside = ratio.clamp(1 - low, 1 + (low if high is None else high))
    outside = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(outside * advantages, inside * advantages)


@dataclass(frozen=True)
class Penalties:
    """β·k3 to the reference, times the ratio if unbiased; minus the entropy bonus."""

    beta: float
    unbiased_kl: bool
    entropy_coef: float


@dataclass(frozen=True)
class Batch:
    """N completions of T positions, [N, T] each."""

    token_logps: Tensor
    mask: Tensor
    advantages: Tensor  # or [N]
    old_token_logps: Tensor | None = None
    ref_token_logps: Tensor | None = None
    entropy: Tensor | None = None
    is_weights: Tensor | None = None  # or [N, 1]

    def ratio(self, level: str) -> Tensor:
        """w: [N, 1] for "sequence", else [N, T]."""
        x = log_ratios(self.token_logps, self.old_token_logps)
        if level == "token":
            return exp_cap(x)
        whole = exp_cap(masked_mean(x, self.mask))[:, None]
        if level == "sequence":
            return whole
        return whole.detach() * (self.token_logps - self.token_logps.detach()).exp()

    def kl(self, beta: float) -> Tensor:
        """[N, T] k3 estimate of KL(pi || ref)."""
        ref = required("ref_token_logps", self.ref_token_logps, "beta", beta)
        return k3(ref - self.token_logps)

    def entropy_mean(self, coefficient: float) -> Tensor:
        """[N] rows whose mean is the mean entropy of all scored tokens.

        Whatever is_weights are: a 0 may be of the entropy mask, which TRL applies here as well, or
        of the sampler's weights and the off-policy mask, which it does not.
        """
        entropy = required("entropy", self.entropy, "entropy_coef", coefficient)
        return token_mean(entropy, self.mask)

    def rows(self, term: Term, reduce: Reduction, level: str, penalties: Penalties) -> Tensor:
        """[N] the objective: term and KL reduced over each row, minus the entropy bonus."""
        ratio = self.ratio(level)
        tokens = term(ratio, per_token(self.advantages))
        if self.is_weights is not None:
            tokens = tokens * self.is_weights
        if penalties.beta != 0:
            kl = self.kl(penalties.beta)
            tokens = tokens + penalties.beta * (kl * ratio if penalties.unbiased_kl else kl)
        rows = reduce(tokens, self.mask)
        if penalties.entropy_coef != 0:
            rows = rows - penalties.entropy_coef * self.entropy_mean(penalties.entropy_coef)
        return rows

"""Reward models: preferences between scalar or vector heads. All return [B] unless said.

`r_w, r_l` are the rewards of the chosen (won) and rejected (lost) response. A quantity that may
be a scalar or a vector elsewhere has one shape here, which the decorator states.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import (
    expm1_cap,
    group_count,
    group_starts,
    group_sum,
    logistic,
    marked,
    plackett_luce,
    truths,
    wrong_rows,
)
from ._parameters import Interval, NonNegative, NumGroups, OneOf, Positive
from ._registry import objective

_SCALARS = {"chosen_rewards": "B", "rejected_rewards": "B"}
_VECTORS = {"chosen_rewards": "B D", "rejected_rewards": "B D"}


@objective(
    "bt",
    paper="arXiv:2203.02155",
    family="rewards",
    aliases=("reward", "bradley_terry"),
    shapes=_SCALARS,
)
def bt(
    chosen_rewards: Tensor,  # [B]
    rejected_rewards: Tensor,  # [B]
    margins: Tensor | None = None,  # [B]
    soft_labels: Tensor | None = None,  # [B]
    *,
    center_coef: Annotated[float, NonNegative] = 0.0,
) -> Tensor:  # [B] nats
    """L(r_w - r_l - margins; t) + center_coef·(r_w + r_l)², Bradley-Terry.

    L(z; t) = -t·log σ(z) - (1-t)·log σ(-z); t = soft_labels or 1, and may leave [0, 1].
    center_coef is TRL's center_rewards_coefficient: it pulls the rewards of a pair around 0.
    """
    gap = chosen_rewards - rejected_rewards
    if margins is not None:
        gap = gap - margins
    rows = logistic(gap, 1.0 if soft_labels is None else soft_labels)
    return rows + center_coef * (chosen_rewards + rejected_rewards).square()


@objective("bt_ties", paper="arXiv:2501.13918", family="rewards", shapes=_SCALARS)
def bt_ties(
    chosen_rewards: Tensor,  # [B]
    rejected_rewards: Tensor,  # [B]
    ties: Tensor,  # [B] bool, judged equal
    *,
    theta: Annotated[float, Interval(1, math.inf, "()")] = 5.0,
) -> Tensor:  # [B] nats
    """-log of Rao and Kupper's probabilities, d = r_w - r_l: they sum to 1.

    No tie: -log σ(d - log θ). Tie: -log(θ² - 1) - log σ(d - log θ) - log σ(-d - log θ). θ is the
    ratio of strengths below which a tie is likelier than a win.
    """
    gap, width = chosen_rewards - rejected_rewards, math.log(theta)
    win, loss = F.logsigmoid(gap - width), F.logsigmoid(-gap - width)
    tie = win + loss + math.log(theta - 1) + math.log(theta + 1)
    return -torch.where(ties, tie, win)


@objective("eurus_rm", paper="arXiv:2404.02078", family="rewards", shapes=_SCALARS)
def eurus_rm(
    chosen_rewards: Tensor,  # [B]
    rejected_rewards: Tensor,  # [B]
) -> Tensor:  # [B] nats
    """-log σ(r_w - r_l) - log σ(r_w) - log σ(-r_l): right answers above 0, wrong ones below."""
    absolute = F.logsigmoid(chosen_rewards) + F.logsigmoid(-rejected_rewards)
    return -F.logsigmoid(chosen_rewards - rejected_rewards) - absolute


@objective("gpm", paper="arXiv:2410.02197", family="rewards", shapes=_VECTORS)
def gpm(
    chosen_rewards: Tensor,  # [B, D], D = 2k
    rejected_rewards: Tensor,  # [B, D]
    eigenvalues: Tensor | None = None,  # [B, D/2]
    *,
    tau: Annotated[float, Positive] = 0.1,
    margin: float = 0.0,
) -> Tensor:  # [B] nats
    """-log σ((s - margin)/τ), s = Σ_i e_i·(w_{2i}·l_{2i+1} - w_{2i+1}·l_{2i}).

    e = eigenvalues or 1. s is antisymmetric, so preferences may run in circles.
    """
    rows, width = chosen_rewards.shape
    if width % 2:
        raise ValueError(f"chosen_rewards: expected an even width, got {(rows, width)}")
    if eigenvalues is not None and eigenvalues.shape[1] != width // 2:
        got = tuple(eigenvalues.shape)
        raise ValueError(f"eigenvalues: expected shape {(rows, width // 2)}, got {got}")
    won, lost = (x.unflatten(1, (width // 2, 2)) for x in (chosen_rewards, rejected_rewards))
    planes = won[..., 0] * lost[..., 1] - won[..., 1] * lost[..., 0]
    if eigenvalues is not None:
        planes = eigenvalues * planes
    return -F.logsigmoid((planes.sum(1) - margin) / tau)


@objective("pal", paper="arXiv:2406.08469", family="rewards", shapes=_VECTORS)
def pal(
    chosen_rewards: Tensor,  # [B, D] embeddings
    rejected_rewards: Tensor,  # [B, D]
    anchors: Tensor,  # [B, D] the user's mixture of prototypes
    *,
    loss: Annotated[str, OneOf("logistic", "hinge")] = "logistic",
) -> Tensor:  # [B]
    """d = |f_l - a|² - |f_w - a|². logistic: -log σ(d). hinge: max(0, 1 - d)."""
    far = (rejected_rewards - anchors).square().sum(1)
    gap = far - (chosen_rewards - anchors).square().sum(1)
    return torch.relu(1 - gap) if loss == "hinge" else -F.logsigmoid(gap)


@objective("lore", paper="arXiv:2504.14439", family="rewards", shapes=_VECTORS)
def lore(
    chosen_rewards: Tensor,  # [B, D] of the basis rewards
    rejected_rewards: Tensor,  # [B, D]
    user_weights: Tensor,  # [B, D] on the simplex
) -> Tensor:  # [B] nats
    """-log σ(Σ_k u_k·(R_w - R_l)_k)."""
    return -F.logsigmoid((user_weights * (chosen_rewards - rejected_rewards)).sum(1))


@objective("vpl", paper="arXiv:2408.10075", family="rewards", shapes=_SCALARS)
def vpl(
    chosen_rewards: Tensor,  # [B] given the sampled latent
    rejected_rewards: Tensor,  # [B]
    latent_mean: Tensor,  # [B, D]
    latent_logvar: Tensor,  # [B, D]
    *,
    kl_coef: Annotated[float, NonNegative] = 0.0001,
) -> Tensor:  # [B] nats
    """-log σ(r_w - r_l) + kl_coef·½·Σ_d (μ² + exp⁺(lv) - 1 - lv), the KL to N(0, I)."""
    spread = expm1_cap(latent_logvar) - latent_logvar
    kl = 0.5 * (latent_mean.square() + spread).sum(1)
    return -F.logsigmoid(chosen_rewards - rejected_rewards) + kl_coef * kl


@objective(
    "maxmin_rm",
    paper="arXiv:2402.08925",
    family="rewards",
    shapes={**_VECTORS, "groups": "B"},
)
def maxmin_rm(
    chosen_rewards: Tensor,  # [B, D], one column per reward head
    rejected_rewards: Tensor,  # [B, D]
    groups: Tensor,  # [B] int64, sorted: the annotator of each pair
    *,
    num_groups: NumGroups = None,
) -> Tensor:  # [B] nats
    """-log σ(r_w - r_l) of the head that explains the annotator's pairs best.

    That is the head with the largest Σ log σ(r_w - r_l) over the group, the first of equals (hard
    E-step, without gradient).
    """
    count, wrong = group_count(groups, num_groups)
    fit = F.logsigmoid(chosen_rewards - rejected_rewards)
    totals = group_sum(fit.detach(), groups, count)
    head = totals.argmax(1)[groups]
    return marked(-fit.gather(1, head[:, None]).squeeze(1), wrong)


@objective("contextual_quality", family="rewards", shapes={"rewards": "N"})
def contextual_quality(
    rewards: Tensor,  # [N]
    labels: Tensor,  # [N] bool, the chosen row
    groups: Tensor,  # [N] int64, sorted
    *,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """log(1 + Σ_k e^{r_k}) - r_chosen: a choice among the group and an outside option of reward 0.

    No row labelled: the outside option was chosen. Several: the mean of their rewards. An empty
    group gives 0.
    """
    count, wrong = group_count(groups, num_groups)
    labels, no_labels = truths(labels)
    offsets = group_starts(groups, count)
    # Starting at 0, the largest reward of the group or of the outside option: no exponent below
    # is positive.
    top = torch.segment_reduce(rewards.detach(), "max", offsets=offsets, unsafe=True, initial=0)
    mass = (-top).exp() + group_sum((rewards - top[groups]).exp(), groups, count)
    picked = group_sum(labels.to(rewards.dtype), groups, count).clamp(min=1)
    chosen = group_sum(torch.where(labels, rewards, 0), groups, count) / picked
    return marked(top + mass.log() - chosen, wrong, no_labels)


@objective("rm_listmle", family="rewards", shapes={"rewards": "N"})
def rm_listmle(
    rewards: Tensor,  # [N]
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """Σ_k [log Σ_{j ranked k or later} e^{r_j} - r_k]: the Plackett-Luce ranking by score.

    `dpo_plackett_luce` on rewards with beta 1. Equal scores rank in row order; an empty group
    gives 0.
    """
    count, wrong = group_count(groups, num_groups, scores)
    return marked(plackett_luce(rewards, scores, groups, count), wrong)


@objective("rm_regression", paper="arXiv:2402.18571", family="rewards", shapes={"rewards": "N M"})
def rm_regression(
    rewards: Tensor,  # [N, M]
    objective_scores: Tensor,  # [N, M]
) -> Tensor:  # [N]
    """Σ_k (rewards_k - objective_scores_k)²."""
    return (rewards - objective_scores).square().sum(1)


@objective("restricted_ce", paper="arXiv:2506.14175", family="rewards", aliases=("gram",))
def restricted_ce(
    label_logits: Tensor,  # [N, C] of the candidate words
    label_ids: Tensor,  # [N] int64, in [0, C)
    *,
    label_smoothing: Annotated[float, Interval(0, 1, "[)")] = 0.1,
) -> Tensor:  # [N] nats
    """-Σ_c q_c·log p_c, p = softmax over the C candidates only, q = (1-ε)·one-hot + ε/C.

    An id outside [0, C) is an error on a CPU; elsewhere its row is NaN.
    """
    words = label_logits.shape[1]
    outside = (label_ids < 0) | (label_ids >= words)
    wrong = wrong_rows("label_ids", label_ids, outside, "ids in [0, {})", words)
    word = torch.arange(words, dtype=torch.int64, device=label_ids.device)
    # Compared, not indexed: a bad id then cannot fault the device.
    hot = label_ids[:, None] == word
    target = (1 - label_smoothing) * hot.to(label_logits.dtype) + label_smoothing / max(words, 1)
    return marked(-(target * label_logits.log_softmax(1)).sum(1), wrong)

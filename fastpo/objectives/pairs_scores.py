"""Pairs, with a score per response: reward, judge, win probability, search value. Family "pairs".

`a, b` are the chosen and rejected log-ratios, `Δ = a - b`, in nats; `s_w, s_l` their scores, which
carry no gradient. All return [B].
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import marked
from ._parameters import NonNegative, OneOf, Positive
from ._registry import objective
from .pairs import dpo, ipo
from .transforms import score_labels


@objective("sppo", paper="arXiv:2405.00675", family="pairs")
def sppo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B] win probability against the previous iterate
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.001,
) -> Tensor:  # [B] nats²
    """½·[(a - (s_w - ½)/β)² + (b - (s_l - ½)/β)²]; the reference is the previous iterate."""
    chosen = chosen_logratios - (chosen_scores - 0.5) / beta
    rejected = rejected_logratios - (rejected_scores - 0.5) / beta
    return 0.5 * (chosen.square() + rejected.square())


@objective("odpo", paper="arXiv:2402.10571", family="pairs")
def odpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B]
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, NonNegative] = 1.0,
    kind: Annotated[str, OneOf("log", "linear")] = "log",
) -> Tensor:  # [B] nats
    """-log σ(β·Δ - offset), g = s_w - s_l. log: offset α·log g; linear: α·g.

    log is 0 where g ≤ 0, the limit of g towards 0.
    """
    gap = chosen_scores - rejected_scores
    if kind == "linear":
        return dpo(chosen_logratios, rejected_logratios, margins=alpha * gap, beta=beta)
    won = ~(gap <= 0)  # a NaN stays one
    offset = alpha * torch.where(won, gap, 1.0).log()
    rows = dpo(chosen_logratios, rejected_logratios, margins=offset, beta=beta)
    return torch.where(won, rows, 0.0)


@objective("modpo", paper="arXiv:2310.03708", family="pairs")
def modpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B] Σ_k w_k·r_k of the other objectives
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
    w0: Annotated[float, Positive] = 0.5,
) -> Tensor:  # [B] nats
    """-log σ((β·Δ - (s_w - s_l)) / w0), w0 the weight of the objective the pairs speak of."""
    gap = chosen_scores - rejected_scores
    return -F.logsigmoid((beta * (chosen_logratios - rejected_logratios) - gap) / w0)


@objective("mappo", paper="arXiv:2507.21183", family="pairs")
def mappo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B] in [0, 1]
    rejected_scores: Tensor,  # [B] in [0, 1]
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats
    """-log σ(β·a - (s_w - s_l)·β·b): the closer the pair, the less rejected is pushed down."""
    gap = chosen_scores - rejected_scores
    return -F.logsigmoid(beta * (chosen_logratios - gap * rejected_logratios))


@objective("mmpo", paper="arXiv:2410.03145", family="pairs")
def mmpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B]
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
    label_scale: Annotated[float, NonNegative] = 2.2,
) -> Tensor:  # [B] nats
    """L(β·Δ; p), p = σ(label_scale·(s_w - s_l)). DNO: label_scale 1 on expected win rates."""
    labels = score_labels(chosen_scores, rejected_scores, scale=label_scale)["soft_labels"]
    return dpo(chosen_logratios, rejected_logratios, soft_labels=labels, beta=beta)


@objective("mcts_dpo", paper="arXiv:2405.00451", family="pairs")
def mcts_dpo(
    chosen_logratios: Tensor,  # [B] nats, from the first token that differs
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B] search value or visit count
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats
    """L(β·Δ; 1 - e), e = min(1 - 1/(1 + s_l/max(1, s_w)), ½); negative scores count as 0."""
    won, lost = chosen_scores.clamp(min=1), rejected_scores.clamp(min=0)
    error = (lost / (won + lost)).clamp(max=0.5)
    return dpo(chosen_logratios, rejected_logratios, soft_labels=1 - error, beta=beta)


@objective("online_ipo", paper="arXiv:2403.08635", family="pairs")
def online_ipo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    soft_labels: Tensor,  # [B] probability that chosen beats rejected
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats²
    """(Δ - (soft_labels - ½)/β)²; label 1 is `ipo`."""
    return (chosen_logratios - rejected_logratios - (soft_labels - 0.5) / beta).square()


@objective("egpo", paper="arXiv:2503.08942", family="pairs", aliases=("online_ipo_1",))
def egpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B] preference over a third sample
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats²
    """(Δ - (s_w - s_l)/β)². The two half-steps of the extragradient are the trainer's."""
    gap = chosen_scores - rejected_scores
    return (chosen_logratios - rejected_logratios - gap / beta).square()


@objective("copg", paper="arXiv:2406.19185", family="pairs")
def copg(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_scores: Tensor,  # [B] reward
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B]
    """[(s_w - β·a) - (s_l - β·b)]² / (2β): the sides need no order. (β/2)·egpo."""
    chosen = chosen_scores - beta * chosen_logratios
    return (chosen - (rejected_scores - beta * rejected_logratios)).square() / (2 * beta)


@objective("online_dpo", paper="arXiv:2402.04792", family="pairs")
def online_dpo(
    chosen_logratios: Tensor,  # [B] nats, one of two samples
    rejected_logratios: Tensor,  # [B] nats, the other
    chosen_scores: Tensor,  # [B]
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
    loss: Annotated[str, OneOf("sigmoid", "ipo")] = "sigmoid",
) -> Tensor:  # [B] nats, ipo: nats²
    """dpo or ipo with the sides in the order of their scores; at a tie chosen is the better."""
    first = chosen_scores >= rejected_scores
    better = torch.where(first, chosen_logratios, rejected_logratios)
    worse = torch.where(first, rejected_logratios, chosen_logratios)
    rows = (dpo if loss == "sigmoid" else ipo)(better, worse, beta=beta)
    # A NaN is in no order: then the row is one, and so is its gradient into both sides.
    return marked(rows, chosen_scores.isnan() | rejected_scores.isnan())

"""Objectives: plain functions of named quantities, one loss per example, never reduced.

    available()               the keys
    get("dpo", beta=0.3)      the function, bound and checked
    compose("dpo", ...)       transforms in front, terms added
    describe("dpo")           its formula, quantities and parameters as text
    @objective("mine", ...)   a row of one's own

Quantities are passed by keyword; their names are the API (`_quantities.SHAPES`).
"""

from . import (
    denoising,
    distillation,
    groups,
    groups_rankings,
    pairs,
    pairs_batch,
    pairs_logps,
    pairs_references,
    pairs_scores,
    pairs_third,
    policy_gradient,
    policy_gradient_sequence,
    policy_gradient_values,
    policy_gradient_weights,
    rewards,
    singles,
    tokens,
    tokens_kl,
    transforms,
)
from ._compose import compose
from ._describe import describe
from ._parameters import Interval, NonNegative, OneOf, Positive, Unit
from ._registry import available, families, get, objective, transform

__all__ = [
    "Interval",
    "NonNegative",
    "OneOf",
    "Positive",
    "Unit",
    "available",
    "compose",
    "denoising",
    "describe",
    "distillation",
    "families",
    "get",
    "groups",
    "groups_rankings",
    "objective",
    "pairs",
    "pairs_batch",
    "pairs_logps",
    "pairs_references",
    "pairs_scores",
    "pairs_third",
    "policy_gradient",
    "policy_gradient_sequence",
    "policy_gradient_values",
    "policy_gradient_weights",
    "rewards",
    "singles",
    "tokens",
    "tokens_kl",
    "transform",
    "transforms",
]

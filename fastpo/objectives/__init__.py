"""Objectives: plain functions of named quantities, one loss per example, never reduced.

    available()               the keys
    get("dpo", beta=0.3)      the function, bound and checked
    compose("dpo", ...)       transforms in front, terms added
    @objective("mine", ...)   a row of one's own

Quantities are passed by keyword; their names are the API (`_quantities.SHAPES`).
"""

from . import (
    denoising,
    distillation,
    groups,
    pairs,
    pairs_logps,
    policy_gradient,
    rewards,
    singles,
    tokens,
    transforms,
)
from ._compose import compose
from ._registry import (
    Interval,
    NonNegative,
    OneOf,
    Positive,
    Unit,
    available,
    families,
    get,
    objective,
    transform,
)

__all__ = [
    "Interval",
    "NonNegative",
    "OneOf",
    "Positive",
    "Unit",
    "available",
    "compose",
    "denoising",
    "distillation",
    "families",
    "get",
    "groups",
    "objective",
    "pairs",
    "pairs_logps",
    "policy_gradient",
    "rewards",
    "singles",
    "tokens",
    "transform",
    "transforms",
]

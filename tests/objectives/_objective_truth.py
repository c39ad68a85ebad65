"""What the objectives ought to return: the catalogue's formulas, naively, in float64.

One row per objective: a function of the same name and signature, written from the formula without
any of the numerics of `fastpo.objectives._math`, and the hyperparameters to try it with:

    @truth("hinge", {"beta": 0.7})
    def hinge(a, b, *, beta=0.1):
        return torch.clamp(1 - beta * (a - b), min=0)

Quantities come by position, so their names are free; the defaults are the catalogue's, written
again. Run in float32 the same row is the eager baseline the comparison rule wants. Rows of other
families live in `_objective_truth_<family>.py`, which the tests import by that pattern.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpo.objectives import _quantities
from fastpo.objectives._registry import quantities_of

SIZES = {"B": 6, "N": 6, "T": 5, "K": 3, "U": 4, "D": 4, "E": 2, "M": 3, "C": 3, "P": 6, "V": 7}
G = 3


@dataclass(frozen=True)
class Row:
    """A truth, and what the tests have to know about its objective."""

    function: Callable[..., Any]
    cases: tuple[dict[str, Any], ...]  # the defaults, then those given
    order: str = "rows"  # permuting the batch permutes the rows; "ranks": leaves them; "fixed"
    forms: dict[str, int] = field(
        default_factory=dict
    )  # which shape of the table, if not the first
    gradient_into: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # optional quantities the cases beyond the defaults ask for
    always: tuple[str, ...] = ()  # optional quantities even the defaults ask for
    excludes: tuple[str, ...] = ()  # optional quantities they cannot have
    sizes: dict[str, int] = field(default_factory=dict)  # dimensions that cannot be any number
    detaches: bool = False  # stops a gradient on purpose: finite differences see more than that


ROWS: dict[str, Row] = {}


def truth(key: str, *cases: dict[str, Any], **facts: Any) -> Callable[..., Any]:
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        ROWS[key] = Row(function, ({}, *cases), **facts)
        return function

    return enter


def make_inputs(
    objective: Callable[..., Any],
    *,
    seed: int = 0,
    extreme: bool = False,
    forms: dict[str, int] | None = None,
    **sizes: int,
) -> dict[str, Tensor]:
    """float64 quantities for an objective, by name. Typical ones include an empty completion."""
    g = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name in quantities_of(objective):
        dims = _quantities.SHAPES[name][(forms or {}).get(name, 0)]
        shape = [{**SIZES, "1": 1, **sizes}[dim] for dim in dims]
        made[name] = _values(name, shape, g, extreme)
    for name in made:  # an empty completion has sum 0
        lengths = made.get(name.replace("logps", "lengths")) if name.endswith("logps") else None
        if lengths is not None and lengths.shape == made[name].shape:
            made[name] = made[name] * (lengths > 0)
    return made


_SIGNED = torch.tensor([-500, -88.8, -40, -1e-3, 0, 1e-3, 40, 88.8, 500], dtype=torch.float64)
_POSITIVE = ("entropy", "kl", "errors", "weights", "eigenvalues", "log_sum_sq_probs")


def _values(name: str, shape: list[int], g: torch.Generator, extreme: bool) -> Tensor:
    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    if name.endswith("mask"):
        mask = torch.rand(shape, generator=g) < 0.7
        mask[:1] = False  # an empty row
        mask[1:2] = True
        return mask
    if name.endswith("lengths"):
        return integers(0, 2 if extreme else 5)
    if name == "groups":
        return integers(0, G).sort().values
    if name in ("labels", "ties"):
        return integers(0, 2).bool()
    if name.endswith("segments"):
        return integers(-1, 3)
    if name in ("steps", "label_ids"):
        return integers(0, SIZES["C"])
    normal = torch.randn(shape, generator=g, dtype=torch.float64)
    signed = _SIGNED[integers(0, len(_SIGNED))] if extreme else 1.5 * normal
    if name == "soft_labels":
        return integers(-1, 4) / 2.0 if extreme else 0.5 + 0.4 * normal
    if name.endswith("topk_logps"):
        return torch.log_softmax(signed, -1) + torch.tensor(0.8, dtype=torch.float64).log()
    if name.endswith("logps"):
        return -signed.abs()
    if name == "user_weights":
        return torch.softmax(normal, -1)
    if name.endswith(_POSITIVE) or name in ("token_reverse_kl", "forward_kl"):
        return -signed.abs() if name.endswith("probs") else signed.abs()
    return signed


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def loss(z: Tensor, t: Any = 1.0) -> Tensor:
    return -t * log_sigmoid(z) - (1 - t) * log_sigmoid(-z)


def per_token(x: Tensor, n: Tensor) -> Tensor:
    return x / torch.maximum(n, torch.ones_like(n))


def nll_of(logps: Tensor, n: Tensor, reduction: str) -> Tensor:
    if reduction == "batch":
        return -logps * len(logps) / max(n.sum(), 1)
    return -logps if reduction == "sum" else -per_token(logps, n)


@truth(
    "dpo",
    {"beta": 0.5, "label_smoothing": 0.2},
    {"beta": 2.0, "label_smoothing": 1.0},
    excludes=("soft_labels",),
)
def dpo(a, b, soft_labels=None, margins=0, pair_weights=1, *, beta=0.1, label_smoothing=0.0):
    t = 1 - label_smoothing if soft_labels is None else soft_labels
    return pair_weights * loss(beta * (a - b) - margins, t)


@truth("robust_dpo", {"beta": 0.7, "label_smoothing": 0.4}, {"label_smoothing": 0.0})
def robust_dpo(a, b, *, beta=0.1, label_smoothing=0.1):
    z, e = beta * (a - b), label_smoothing
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


@truth("hinge", {"beta": 0.7})
def hinge(a, b, *, beta=0.1):
    return torch.clamp(1 - beta * (a - b), min=0)


@truth("ipo", {"beta": 0.7})
def ipo(a, b, *, beta=0.1):
    return (a - b - 0.5 / beta) ** 2


@truth("ipo_norm", {"beta": 0.7})
def ipo_norm(a, b, n_c, n_r, *, beta=0.1):
    return (per_token(a, n_c) - per_token(b, n_r) - 0.5 / beta) ** 2


@truth("dpo_norm", {"beta": 0.7})
def dpo_norm(a, b, n_c, n_r, *, beta=5.0):
    return loss(beta * (per_token(a, n_c) - per_token(b, n_r)))


@truth("exo_pair", {"beta": 0.7, "label_smoothing": 0.3})
def exo_pair(a, b, *, beta=0.1, label_smoothing=0.001):
    p = torch.stack([torch.sigmoid(beta * (a - b)), torch.sigmoid(beta * (b - a))])
    target = torch.tensor([[1 - label_smoothing], [label_smoothing]], dtype=torch.float64)
    return (p * (p.log() - target.log().to(p))).sum(0)


@truth("nca_pair", {"beta": 0.7})
def nca_pair(a, b, *, beta=0.1):
    return loss(beta * a) + loss(-beta * a) / 2 + loss(-beta * b) / 2


@truth("bco_pair", {"beta": 0.7, "delta": 0.4})
def bco_pair(a, b, *, beta=0.1, delta=0.0):
    return loss(beta * a - delta) + loss(-(beta * b - delta))


@truth("sppo_hard", {"beta": 0.7})
def sppo_hard(a, b, *, beta=0.001):
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


@truth("aot", {"beta": 0.7, "label_smoothing": 0.2}, order="ranks")
def aot(c, r, c0, r0, *, beta=0.1, label_smoothing=0.0):
    policy, reference = c - r, c0 - r0
    d = policy[policy.argsort()] - reference[reference.argsort()]
    return loss(beta * d, 1 - label_smoothing)


@truth("aot_unpaired", {"beta": 0.7, "label_smoothing": 0.2}, order="ranks")
def aot_unpaired(a, b, *, beta=0.1, label_smoothing=0.0):
    return loss(beta * (a[a.argsort()] - b[b.argsort()]), 1 - label_smoothing)


@truth("apo_zero", {"beta": 0.7})
def apo_zero(a, b, *, beta=0.1):
    return 1 - torch.sigmoid(beta * a) + torch.sigmoid(beta * b)


@truth("apo_down", {"beta": 0.7})
def apo_down(a, b, *, beta=0.1):
    return torch.sigmoid(beta * a) + 1 - torch.sigmoid(beta * (a - b))


@truth("discopop", {"beta": 0.7, "tau": 0.3}, {"tau": 2.0})
def discopop(a, b, *, beta=0.05, tau=0.05):
    x = beta * (a - b)
    m = torch.sigmoid(x / tau)
    return -log_sigmoid(x) * (1 - m) + torch.exp(-x) * m


@truth("sft", {"reduction": "sum"}, {"reduction": "mean"})
def sft(c, n_c, *, reduction="batch"):
    return nll_of(c, n_c, reduction)


@truth("cpo", {"beta": 0.7, "cpo_alpha": 0.3, "label_smoothing": 0.1, "sft_reduction": "batch"})
def cpo(c, r, n_c, *, beta=0.1, cpo_alpha=1.0, label_smoothing=0.0, sft_reduction="mean"):
    return loss(beta * (c - r), 1 - label_smoothing) + cpo_alpha * nll_of(c, n_c, sft_reduction)


@truth("simpo", {"beta": 0.7, "gamma": -0.4, "label_smoothing": 0.1})
def simpo(c, r, n_c, n_r, *, beta=2.0, gamma=1.0, label_smoothing=0.0):
    return loss(beta * (per_token(c, n_c) - per_token(r, n_r)) - gamma, 1 - label_smoothing)


@truth("orpo", {"beta": 0.7})
def orpo(c, r, n_c, n_r, *, beta=0.1):
    def log_odds(x):
        p = torch.exp(torch.clamp(x, max=-1e-6))
        return torch.log(p / (1 - p))

    c, r = per_token(c, n_c), per_token(r, n_r)
    return -c + beta * loss(log_odds(c) - log_odds(r))


@truth("nll", {"reduction": "sum"}, {"reduction": "mean"})
def nll(logps, n, *, reduction="batch"):
    return nll_of(logps, n, reduction)


@truth("kto", {"beta": 0.7, "desirable_weight": 0.5, "undesirable_weight": 2.0})
def kto(x, labels, kl, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    z0 = max(kl.mean().item(), 0.0) if len(kl) else 0.0
    good = desirable_weight * (1 - torch.sigmoid(beta * (x - z0)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (z0 - x)))
    return labels * good + ~labels * bad


@truth("kto_apo_zero", {"beta": 0.7, "desirable_weight": 0.5, "undesirable_weight": 2.0})
def kto_apo_zero(x, labels, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    good = desirable_weight * (1 - torch.sigmoid(beta * x))
    return labels * good + ~labels * undesirable_weight * torch.sigmoid(beta * x)

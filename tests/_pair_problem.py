"""Tiles of two heads as the driver passes them to the pair kernels, and whole rows for comparison.

What is expected comes from autograd over the divergences as papers write them, never from the
kernels' own derivatives: in float64 it is the truth, in float32 plain PyTorch's error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastpo.ops.rows.backend import LOG_FLOOR, LogitMap
from fastpo.ops.rows.pair import backend as P
from fastpo.testing import assert_as_good_as_eager, make_head

Maps = tuple[LogitMap, LogitMap]
PLAIN = (LogitMap(), LogitMap())
RULES = {
    "forward_kl": P.Rule("forward_kl"),
    "reverse_kl": P.Rule("reverse_kl"),
    "jsd": P.Rule("jsd", 0.3),
    "alpha": P.Rule("alpha", 0.4),
    "alpha_beyond": P.Rule("alpha", 1.3),
    "tvd": P.Rule("tvd"),
}
# What float32 loses there is divided by up to 2e-6.
NEAR_LIMITS = (2e-6, 1e-3, -1e-3, 0.999, 1 - 2e-6, 1.001)


@dataclass(frozen=True)
class Problem:
    """Student, then teacher."""

    tiles: tuple[list[Tensor], list[Tensor]]  # each [n, v]
    biases: tuple[Tensor | None, Tensor | None]  # [V]
    maps: Maps

    @property
    def rows(self) -> int:
        return len(self.tiles[0][0])

    @property
    def firsts(self) -> list[int]:
        widths = torch.tensor([0, *(tile.shape[1] for tile in self.tiles[0][:-1])])
        return widths.cumsum(0).tolist()

    def products(self, dtype: torch.dtype) -> list[Tensor]:
        """[n, V] of each head."""
        return [torch.cat(tiles, 1).to(dtype) for tiles in self.tiles]

    def logits(self, products: list[Tensor]) -> list[Tensor]:
        found = []
        for x, bias, m in zip(products, self.biases, self.maps, strict=True):
            x = x if bias is None else x + bias.to(x.dtype)
            inner = m.factor if m.softcap is None else m.logit_scale / m.softcap
            found.append(x * inner if m.softcap is None else torch.tanh(x * inner) * m.cap)
        return found

    def sides(self, tile: int, device: str) -> P.Sides:
        """With a row stride that no vector width divides."""
        student, teacher = (
            P.Side(_strided(tiles[tile].to(device)), None if b is None else b.to(device), logit_map)
            for tiles, b, logit_map in zip(self.tiles, self.biases, self.maps, strict=True)
        )
        return student, teacher


def _strided(x: Tensor, fill: float = 7.0, columns: int = 3) -> Tensor:
    """The same values as columns of a wider buffer."""
    return x.new_full((len(x), x.shape[1] + columns), fill)[:, : x.shape[1]].copy_(x)


def make_problem(
    n: int,
    v: int,
    maps: Maps = PLAIN,
    *,
    tiles: int = 2,
    spread: float = 3.0,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """Close to each other, as a student and its teacher are."""
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(n, v, generator=g) * spread for _ in range(tiles)]
    teacher = [x * 0.8 + torch.randn(n, v, generator=g) for x in student]
    draws = [torch.randn(tiles * v, generator=g) for _ in range(2)]
    biases = (draws[0], draws[1]) if bias else (None, None)
    return Problem((student, teacher), biases, maps)


def whole_state(problem: Problem, over: int | None, entropy: bool, dtype: torch.dtype) -> Tensor:
    """The definition in rows/pair/backend.py over whole rows, [STATE, n]."""
    state = torch.tensor(P.INITIAL_STATE, dtype=dtype).unsqueeze(1).repeat(1, problem.rows)
    z = problem.logits(problem.products(dtype))
    gaps = []
    for i in range(2):
        m = z[i].amax(1)
        gaps.append((z[i] - m.unsqueeze(1)).clamp_min(P.LOWEST))
        state[P.MAX + 2 * i], state[P.MASS + 2 * i] = m, gaps[i].exp().sum(1)
    if over is not None:
        state[P.CROSS] = (gaps[over].exp() * (gaps[over] - gaps[1 - over])).sum(1)
    if entropy:
        state[P.MOMENT] = (gaps[0].exp() * gaps[0].clamp_min(LOG_FLOOR)).sum(1)
    return state


def constants_of(state: Tensor) -> Tensor:
    """[CONSTANTS, n] float32 as the driver derives them."""
    pairs = [(state[P.MAX + i], state[P.MASS + i].log()) for i in (0, 2)]
    return torch.stack([x for pair in pairs for x in pair]).float()


def make_constants(problem: Problem) -> Tensor:
    return constants_of(whole_state(problem, None, False, torch.float64))


def make_factors(n: int, seed: int = 1) -> Tensor:
    """[FACTORS, n]: any numbers, not those a softmax would lead to."""
    return torch.randn(P.FACTORS, n, generator=torch.Generator().manual_seed(seed))


def divergence(rule: P.Rule, s: Tensor, t: Tensor) -> Tensor:
    """f of log-probabilities, cell by cell."""
    p, q = s.exp(), t.exp()
    if rule.kind == "forward_kl":
        return q * (t - s)
    if rule.kind == "reverse_kl":
        return p * (s - t)
    if rule.kind == "tvd":
        return 0.5 * (p - q).abs()
    weight = rule.parameter
    if rule.kind == "jsd":
        m = torch.logaddexp(s + math.log1p(-weight), t + math.log(weight))
        return weight * q * (t - m) + (1 - weight) * p * (s - m)
    exponent = weight * t + (1 - weight) * s
    # The exponent's cap is no part of the derivative.
    e = exponent.detach().clamp_max(P.LARGEST).exp() * (1 + (exponent - exponent.detach()))
    return (e - weight * q - (1 - weight) * p) / (weight * (weight - 1))


def _log_probs(z: list[Tensor], constants: Tensor) -> list[Tensor]:
    c = constants.to(z[0].dtype).unsqueeze(2)
    return [
        (x.detach() - c[P.SHIFT + i] - c[P.LOG_MASS + i]).clamp_min(P.LOWEST).requires_grad_()
        for i, x in zip((0, 2), z, strict=True)
    ]


def _derivatives(rule: P.Rule, log_probs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    f = divergence(rule, *log_probs)
    return f.detach(), torch.autograd.grad(f.sum(), log_probs)


def whole_sums(problem: Problem, rule: P.Rule, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """[SUMS, n]."""
    z = problem.logits(problem.products(dtype))
    f, derivatives = _derivatives(rule, _log_probs(z, constants))
    return torch.stack([x.sum(1) for x in (f, *derivatives)])


def whole_gradients(
    problem: Problem, rule: P.Rule, constants: Tensor, factors: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """[n, V] of each head."""
    products = [x.requires_grad_() for x in problem.products(dtype)]
    z = problem.logits(products)
    slopes = torch.autograd.grad([x.sum() for x in z], products)
    log_probs = _log_probs(z, constants)
    _, derivatives = _derivatives(rule, log_probs)
    factors = factors.to(dtype).unsqueeze(2)
    found = []
    for i in range(2):
        dz = derivatives[i] - log_probs[i].detach().exp() * factors[P.TOTAL + i]
        found.append(factors[P.GRAD] * dz * slopes[i])
    return found


def fold(
    kernels: ModuleType,
    problem: Problem,
    over: int | None = None,
    entropy: bool = False,
    device: str = "cpu",
) -> Tensor:
    """State after all tiles, [STATE, n]; the driver passes columns of a wider buffer."""
    initial = torch.tensor(P.INITIAL_STATE, device=device).unsqueeze(1)
    wide = initial.repeat(1, problem.rows + 5)
    state = wide[:, 2 : problem.rows + 2]
    for i, first in enumerate(problem.firsts):
        kernels.softmaxes(problem.sides(i, device), first, state, over, entropy)
    outside = torch.cat((wide[:, :2], wide[:, problem.rows + 2 :]), 1)
    assert torch.equal(outside, initial.expand_as(outside)), "wrote beside its rows"
    return state.cpu()


def add_up(
    kernels: ModuleType, problem: Problem, rule: P.Rule, constants: Tensor, device: str = "cpu"
) -> Tensor:
    """What all tiles add to sums that are not 0, [SUMS, n]."""
    before = torch.full((P.SUMS, problem.rows + 3), 2.0, dtype=torch.float64, device=device)
    sums = before.clone()[:, 1:-2]
    constants = _strided(constants.to(device))
    for i, first in enumerate(problem.firsts):
        kernels.values(problem.sides(i, device), first, constants, rule, sums)
    return (sums - before[:, 1:-2]).cpu()


def turn(
    kernels: ModuleType,
    problem: Problem,
    rule: P.Rule,
    constants: Tensor,
    factors: Tensor,
    *,
    wanted: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor | None]:
    """d loss / d products of all tiles, [n, V] of each head that is wanted."""
    constants, factors = _strided(constants.to(device)), _strided(factors.to(device))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, first in enumerate(problem.firsts):
        sides = problem.sides(i, device)
        n, v = sides[0].tile.shape
        wide = [torch.full((n, v + 1), 9.0, dtype=dtype, device=device) for _ in range(2)]
        student, teacher = (x[:, :-1] if w else None for x, w in zip(wide, wanted, strict=True))
        kernels.gradients(sides, first, constants, factors, rule, (student, teacher))
        for x, collected in zip(wide, found, strict=True):
            assert (x[:, -1] == 9.0).all(), "wrote behind the tile"
            collected.append(x[:, :-1].cpu())
    return [torch.cat(x, 1) if w else None for x, w in zip(found, wanted, strict=True)]


def assert_as_good(name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The rule of fastpo.testing; what stands for infinity is compared apart, by its size."""
    huge = truth.abs() > 1e15  # capped exponents of the alpha divergence, too
    torch.testing.assert_close(ours[huge].double(), truth[huge], rtol=1e-5, atol=0.0)
    ours, eager, truth = (x.masked_fill(huge, 0.0) for x in (ours, eager, truth))
    # Few rows at a time: eager is sometimes lucky, and rounds other cells.
    assert_as_good_as_eager(name, ours, eager, truth, factor=4.0)


def assert_near_limit(kernels: ModuleType, alpha: float, device: str = "cpu") -> None:
    """A few roundings of float32, none of them over α·(1 - α)."""
    problem, rule = make_problem(8, 70, seed=11), P.Rule("alpha", alpha)
    constants, factors = make_constants(problem), make_factors(problem.rows)
    ours = [add_up(kernels, problem, rule, constants, device)]
    ours += turn(kernels, problem, rule, constants, factors, device=device)
    truth = [whole_sums(problem, rule, constants, torch.float64)]
    truth += whole_gradients(problem, rule, constants, factors, torch.float64)
    for name, o, t in zip(("sums", "student", "teacher"), ours, truth, strict=True):
        error = ((o - t).norm() / t.norm()).item()
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


def sides(tokens=13, vocab=211, dtype=torch.float32, seed=0):
    student = make_head(tokens, vocab, 24, bias=True, seed=seed)
    # Close to the student, as a teacher is: its words plus something of its own.
    extra = make_head(tokens, vocab, 40, bias=True, seed=seed + 1)
    tensors = [student.hidden, student.weight, student.bias]
    tensors += [extra.hidden * 0.7, extra.weight, extra.bias]
    return [x.to(dtype).requires_grad_() for x in tensors]

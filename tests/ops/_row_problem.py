"""A row of vocabulary tiles as the driver passes it to the row kernels, and its float64 truth."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastpo.ops.rows import backend as R
from fastpo.testing import assert_as_good_as_eager, max_error, rounding

ALL_STATS = sum(R.STATS.values())


@dataclass(frozen=True)
class Problem:
    """A row of tiles as the driver has them: views into wider buffers, labels in any tile."""

    tiles: list[Tensor]  # each [n, v]
    labels: Tensor  # [n]
    bias: Tensor | None  # [V]
    logit_map: R.LogitMap

    @property
    def firsts(self) -> list[int]:
        widths = torch.tensor([0, *(tile.shape[1] for tile in self.tiles[:-1])])
        return widths.cumsum(0).tolist()

    def to(self, device: str) -> Problem:
        bias = None if self.bias is None else self.bias.to(device)
        tiles = [_strided(tile.to(device)) for tile in self.tiles]
        return Problem(tiles, self.labels.to(device), bias, self.logit_map)

    def logits(self) -> Tensor:
        """[n, V] float64."""
        x = torch.cat(self.tiles, 1).double()
        x = x if self.bias is None else x + self.bias.double()
        if self.logit_map.softcap is None:
            return x * self.logit_map.factor
        inner = self.logit_map.logit_scale / self.logit_map.softcap
        return torch.tanh(x * inner) * self.logit_map.cap

    def is_label(self) -> Tensor:
        columns = torch.arange(sum(tile.shape[1] for tile in self.tiles))
        return columns == self.labels.unsqueeze(1)


def _strided(tile: Tensor) -> Tensor:
    """The same values with a row stride that no vector width divides."""
    n, v = tile.shape
    return tile.new_full((n, v + 3), 7.0)[:, :v].copy_(tile)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    """float32, the same numbers everywhere: drawn as float32 they vary with the processor."""
    return torch.randn(*shape, generator=g, dtype=torch.float64).float()


def make_problem(
    n: int,
    v: int,
    logit_map: R.LogitMap,
    *,
    tiles: int = 2,
    spread: float = 3.0,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """Of numbers drawn anew about one comparison in a thousand breaks the rule, mostly where a
    soft-cap nearly saturates; none does of these.
    """
    g = torch.Generator().manual_seed(100 + seed)
    drawn = [normal(g, n, v) * spread for _ in range(tiles)]
    labels = torch.randint(0, v * tiles, (n,), generator=g)
    offset = normal(g, v * tiles) if bias else None
    return Problem(drawn, labels, offset, logit_map)


@dataclass(frozen=True)
class Folded:
    state: Tensor
    kept: list[Tensor]
    anchors: list[Tensor]


def initial_state(n: int, device: str = "cpu") -> Tensor:
    """[STATE, n] as the driver passes it: columns of a wider buffer."""
    wide = torch.tensor(R.INITIAL_STATE, device=device).unsqueeze(1).repeat(1, n + 5)
    return wide[:, 2 : n + 2]


def fold(
    kernels: ModuleType,
    problem: Problem,
    *,
    stats: int = ALL_STATS,
    kept: torch.dtype | None = None,
    fold_cap: bool = False,
    device: str = "cpu",
) -> Folded:
    problem = problem.to(device)
    n = len(problem.labels)
    result = Folded(initial_state(n, device), [], [])
    for tile, first in zip(problem.tiles, problem.firsts, strict=True):
        stored = anchors = None
        if kept is not None:
            stored = torch.full((n, tile.shape[1] + 1), 9.0, dtype=kept, device=device)[:, :-1]
            anchors = torch.empty(n, device=device)
            result.kept.append(stored)
            result.anchors.append(anchors)
        kernels.forward(
            tile,
            first,
            problem.labels,
            problem.bias,
            result.state,
            problem.logit_map,
            stats,
            stored,
            anchors,
            fold_cap,
        )
    return Folded(
        result.state.cpu(), [k.cpu() for k in result.kept], [a.cpu() for a in result.anchors]
    )


def true_state(problem: Problem) -> Tensor:
    """The definition in rows/backend.py over whole rows, float64 [STATE, n]."""
    z, label = problem.logits(), problem.is_label()
    m = z.amax(1)
    gap = z - m.unsqueeze(1)
    others = gap.exp().masked_fill(label, 0.0)
    target = torch.where(label.any(1), z.masked_fill(~label, 0.0).sum(1), float("nan"))
    earlier = torch.arange(z.shape[1]) >= problem.labels.unsqueeze(1)
    rows = [torch.empty(0)] * R.STATE
    rows[R.MAX], rows[R.OTHERS], rows[R.TARGET] = m, others.sum(1), target
    rows[R.MOMENT] = (others * gap.clamp_min(R.LOG_FLOOR)).sum(1)
    rows[R.SQUARES], rows[R.SUM] = others.square().sum(1), z.sum(1)
    rows[R.BEFORE] = z.masked_fill(earlier, float("-inf")).amax(1)
    return torch.stack(rows)


def assert_state(problem: Problem, ours: Folded, eager: Folded) -> None:
    truth = true_state(problem)
    names = ("max", "others", "target", "moment", "squares", "sum", "before")
    for row, name in enumerate(names):
        assert_as_good_as_eager(name, ours.state[row], eager.state[row], truth[row])


def assert_kept(problem: Problem, ours: Folded, eager: Folded, fold_cap: bool) -> None:
    """exp(z - m), from what was stored and the anchors it was stored with."""
    z, dtype = problem.logits(), ours.kept[0].dtype
    m = z.amax(1, keepdim=True)
    truth = (z - m).exp().masked_fill(problem.is_label(), 0.0)
    if fold_cap:
        truth = truth * problem.logit_map.cap_slope(z)

    def value(folded: Folded) -> Tensor:
        pairs = zip(folded.kept, folded.anchors, strict=True)
        return torch.cat([k.double() * (a.unsqueeze(1) - m).exp() for k, a in pairs], 1)

    error, allowed = max_error(value(ours), truth), 2 * max_error(value(eager), truth)
    assert error <= allowed + rounding(truth, dtype), (dtype, error, allowed)


def make_grads(problem: Problem, *, seed: int = 1) -> Tensor:
    """[GRADS, n] float32, with the maximum and log-mass the logits have."""
    g = torch.Generator().manual_seed(seed)
    z = problem.logits()
    grads = normal(g, R.GRADS, len(z))
    grads[R.SHIFT] = z.amax(1)
    grads[R.LOG_MASS] = (z - grads[R.SHIFT].double().unsqueeze(1)).exp().sum(1).log()
    return grads


def turn(
    kernels: ModuleType,
    problem: Problem,
    grads: Tensor,
    *,
    folded: Folded | None = None,
    entropy_grad: bool = True,
    out: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensor:
    """d loss / d products of all tiles [n, V], from raw products or from what was kept."""
    problem, grads = problem.to(device), grads.to(device)
    results = []
    for i, (tile, first) in enumerate(zip(problem.tiles, problem.firsts, strict=True)):
        source = tile if folded is None else folded.kept[i].to(device)
        anchors = None if folded is None else folded.anchors[i].to(device)
        wide = torch.full((len(tile), tile.shape[1] + 1), 9.0, dtype=out, device=device)
        kernels.backward(
            source,
            anchors,
            first,
            problem.labels,
            problem.bias,
            grads,
            problem.logit_map,
            entropy_grad,
            wide[:, :-1],
        )
        assert (wide[:, -1] == 9.0).all(), "wrote behind the tile"
        results.append(wide[:, :-1].cpu())
    return torch.cat(results, 1)


def true_turn(
    problem: Problem, grads: Tensor, folded: Folded | None, *, entropy_grad: bool
) -> Tensor:
    """The definition in rows/backend.py in float64, from the products or from what was kept."""
    shift, log_mass, common, entropy, at_label = (row.unsqueeze(1) for row in grads.double())
    z = problem.logits()
    if folded is not None:
        pairs = zip(folded.kept, folded.anchors, strict=True)
        z = torch.cat([k.double().log() + a.double().unsqueeze(1) for k, a in pairs], 1)
    log_p = (z - shift - log_mass).clamp_min(R.LOG_FLOOR)
    dz = log_p.exp() * (common - (entropy * log_p if entropy_grad else 0.0))
    logit_map = problem.logit_map
    if logit_map.softcap is not None:
        dz = dz * logit_map.cap_slope(z.clamp_min(-logit_map.cap))
    return torch.where(problem.is_label(), at_label, dz * logit_map.factor)

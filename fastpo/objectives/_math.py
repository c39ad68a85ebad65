"""Numerics every objective shares: the "Conventions" of the catalogue, nothing else.

All of it is elementwise or per row, differentiable, and free of host synchronisation. Inputs are
float32 or float64 by the time they get here (`promote` runs at the door of every objective).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXP_CAP = 40.0  # products of two exponentials stay finite in float32: e^80 < 3e38
_CUT = -1e-6
REDUCTIONS = ("mean", "sum", "batch")


def promote(x: Tensor) -> Tensor:
    """float16 and bfloat16 are computed in float32; every other dtype stays what it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exp_cap(x: Tensor, cap: float = EXP_CAP) -> Tensor:
    """exp⁺(x) = exp(min(x, cap)); no gradient beyond the cap."""
    return x.clamp(max=cap).exp()


def expm1_cap(x: Tensor, cap: float = EXP_CAP) -> Tensor:
    """exp⁺(x) - 1 without the cancellation near 0."""
    return x.clamp(max=cap).expm1()


def k3(x: Tensor) -> Tensor:
    """expm1(m) - m with m = min(x, 40): the KL estimate of x = log(ref/pi), never negative."""
    m = x.clamp(max=EXP_CAP)
    return m.expm1() - m


def avg(x: Tensor, lengths: Tensor, power: float = 1.0) -> Tensor:
    """x / max(n, 1)^power: an empty completion has sum 0 and average 0."""
    n = lengths.clamp(min=1).to(x.dtype)
    return x / (n if power == 1.0 else n**power)


def cut(x: Tensor) -> Tensor:
    """min(x, -1e-6): a mean log-probability of 0 would make log(1 - p) infinite."""
    return x.clamp(max=_CUT)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of cut(x): at or below -1e-6 both branches have finite gradients everywhere."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) as -log σ(-x); F.softplus turns linear at 20, which float64 sees."""
    return -F.logsigmoid(-x)


def logistic(z: Tensor, t: Tensor | float = 1.0) -> Tensor:
    """L(z; t) = -t·log σ(z) - (1-t)·log σ(-z). t may leave [0, 1]: no clamp."""
    return -t * F.logsigmoid(z) - (1 - t) * F.logsigmoid(-z)


def nll_term(logps: Tensor, lengths: Tensor, reduction: str) -> Tensor:
    """NLL(logps, lengths; reduction), one value per row; "batch" averages to the token mean."""
    if reduction == "mean":
        return -avg(logps, lengths)
    if reduction == "sum":
        return -logps
    if reduction == "batch":
        return -logps.shape[0] * logps / lengths.sum().clamp(min=1).to(logps.dtype)
    raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def mean_or_zero(x: Tensor) -> Tensor:
    """Mean over everything; the mean over nothing is 0."""
    return x.sum() / max(x.numel(), 1)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the scored positions of the last dimension. Selects: 0·inf would be NaN."""
    return torch.where(mask, x, 0).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the scored positions of the last dimension; 0 where there are none."""
    return avg(masked_sum(x, mask), mask.sum(-1))


def truths(labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """[N] bool, and which are `wrong_rows`: a number that is neither 0 nor 1.

    -1 is how others write "no", and any number but 0 would be a yes.
    """
    if labels.dtype == torch.bool:
        return labels, None
    wrong = (labels != 0) & (labels != 1)
    return labels.bool(), wrong_rows("labels", labels, wrong, "0 or 1")


def shares(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """[N] numbers in [0, 1], checked likewise."""
    wrong = ~((labels >= 0) & (labels <= 1))
    return labels.to(dtype), wrong_rows("labels", labels, wrong, "numbers in [0, 1]")


def group_count(
    groups: Tensor, num_groups: int | None, scores: Tensor | None = None
) -> tuple[int, Tensor | None]:
    """G, and if it cannot be read at once: is one of the `wrong_rows` among them? Without
    num_groups G is read from the device: the one synchronisation allowed.

    With it nothing may wait: ids that do not fit, or do not rise from 0 on, are an error where they
    can be read at once; on a GPU and in a compiled function all of the loss is NaN, or an index
    faults the device. `scores` are those that the groups are compared by: a NaN is neither above
    nor below another, and its row would count as the best, or worse.
    """
    falls = groups.diff(prepend=groups.new_zeros(1)) < 0
    wrong = [wrong_rows("groups", groups, falls, "ids that rise from 0 on")]
    if scores is not None:
        wrong.append(wrong_rows("scores", scores, scores.isnan(), "numbers"))
    if num_groups is not None:
        expected = "ids below num_groups = {}"
        wrong.append(wrong_rows("groups", groups, groups >= num_groups, expected, num_groups))
        count = num_groups
    else:
        count = int(groups.max()) + 1 if groups.numel() else 0
    unread = [rows for rows in wrong if rows is not None]
    return count, torch.stack(unread).any() if unread else None


def wrong_rows(
    name: str, given: Tensor, wrong: Tensor, expected: str, bound: int | None = None
) -> Tensor | None:
    """An error where a row is wrong and can be read at once; else `wrong` [N], for `marked`.

    The bound that is expected is written down for an error alone: a compiler may not know it.
    """
    if not can_be_read(given):
        return wrong
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        got = str(given[row].item()).replace("nan", "NaN")
        raise ValueError(f"{name}: expected {expected.format(bound)}, got {got} in row {row}")
    return None


def marked(x: Tensor, *wrong: Tensor | None) -> Tensor:
    """x [N], a loss, with NaN, and a gradient of NaN, in its wrong rows. If its rows are others',
    as those of groups, all are NaN as soon as one is wrong."""
    for rows in wrong:
        if rows is not None:
            rows = rows if rows.shape == x.shape else rows.any()
            x = x * torch.ones_like(rows, dtype=x.dtype).masked_fill(rows, math.nan)
    return x


def can_be_read(x: Tensor) -> bool:
    """Without waiting for a device: is there a value, and has it one?

    Subclasses of Tensor, as of torch.compile and of plans, may have none, and under torch.vmap it
    is many.
    """
    at_once = type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
    many = at_once and torch._C._functorch.is_functorch_wrapped_tensor(x)
    return at_once and not many and x.numel() > 0


def group_starts(groups: Tensor, num_groups: int) -> Tensor:
    """[G + 1] first row of every group: groups are sorted, so this is a search, not a count."""
    ids = torch.arange(num_groups + 1, dtype=groups.dtype, device=groups.device)
    return torch.searchsorted(groups.contiguous(), ids)


def group_sum(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """[N, ...] -> [G, ...]; an empty group sums to 0. No atomics: the same bits every time."""
    starts = group_starts(groups, num_groups)
    return torch.segment_reduce(x, "sum", offsets=starts, unsafe=True, initial=0)


def group_sizes(groups: Tensor, num_groups: int) -> Tensor:
    """[G] int64 number of rows."""
    return group_starts(groups, num_groups).diff()


def group_center(x: Tensor, groups: Tensor, num_groups: int, known: Tensor | None = None) -> Tensor:
    """[N] x minus the mean of its group, exactly 0 when the group is all equal.

    `known` [N] bool: the rows that count; the others are 0. Measured from the group's largest: the
    rounded mean of equal numbers need not be that number, and a division by their standard
    deviation turns the difference into a large advantage.
    """
    known = torch.ones_like(x, dtype=torch.bool) if known is None else known
    top = group_max(torch.where(known, x, -math.inf), groups, num_groups)
    offset = torch.where(known, x - top[groups], 0)
    sizes = group_sum(known.to(x.dtype), groups, num_groups)
    mean = group_sum(offset, groups, num_groups) / sizes.clamp(min=1)
    return torch.where(known, offset - mean[groups], 0)


def group_max(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """[N] -> [G] without gradient; -inf for an empty group."""
    starts = group_starts(groups, num_groups)
    return torch.segment_reduce(x.detach(), "max", offsets=starts, unsafe=True, initial=-math.inf)


def group_logsumexp(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """[N] or [N, M] -> [G] log Σ e^x over all numbers of a group's rows.

    An x of -inf is left out, with gradient 0. Over nothing it is -inf, again with gradient 0, where
    torch.logsumexp has NaN. Beside a NaN or inf it is NaN.
    """
    wide = x[:, None] if x.ndim == 1 else x
    top = group_max(wide.detach().amax(1), groups, num_groups)
    top = torch.where(top > -math.inf, top, 0)
    mass = group_sum((wide - top[groups][:, None]).exp().sum(1), groups, num_groups)
    some = mass != 0
    return torch.where(some, top + torch.where(some, mass, 1).log(), -math.inf)


def group_log_softmax(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """[N] log of e^x over its sum in the group; exactly 0 for the only row of a group.

    Measured from the group's largest x: beside a top of 3e6 a float32 log 2 would be 0.75.
    """
    below = x - group_max(x, groups, num_groups)[groups]
    return below - group_logsumexp(below, groups, num_groups)[groups]


def plackett_luce(strengths: Tensor, scores: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """[N] -> [G] Σ_k [logsumexp_{j ranked k or later} strength_j - strength_k].

    Rank is by falling score, equal scores in row order. Compares all pairs of rows: suffix sums
    over sorted rows would take the small tail from the large total.
    """
    mine, other = scores[:, None], scores[None, :]
    row = torch.arange(len(scores), dtype=torch.int64, device=scores.device)
    behind = (other < mine) | ((other == mine) & (row[None, :] >= row[:, None]))
    left = behind & (groups[:, None] == groups[None, :])
    rest = torch.where(left, strengths[None, :], -math.inf).logsumexp(1)
    return group_sum(rest - strengths, groups, num_groups)

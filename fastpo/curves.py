"""Value and gradient of an objective along its margin, as numbers and as a picture.

    margins, values, gradients = curve("dpo", beta=0.3)
    plot("dpo", Path("dpo.png"))

The margin is what the policy moves: the difference of two answers' log-ratios or rewards, shared
evenly between them; of objectives that read one answer at a time, its own log-ratio. At 0 the
policy is the reference. All else stands still, and what may be absent is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import objectives
from .objectives._registry import Entry, lookup, quantities_of
from .outputs import check_file

_POINTS = 161
_GOOD, _BAD, _ZERO = "#0b6e8a", "#e0a04a", "#8a8a8a"


class Curve(NamedTuple):
    margins: list[float]
    values: list[float]
    gradients: list[float]  # d value / d margin, as training sees it


class Axis(NamedTuple):
    label: str
    moved: tuple[str, ...]  # an objective that needs one of these has this margin
    end: float  # from -end to end
    rows: int = 1  # a group is two answers of one prompt
    tokens: int = 16


_PAIR = ("chosen_logratios", "chosen_logps", "chosen_token_logps")
_SINGLE = ("logratios", "logps")
_ALONE = Axis("log-ratio of the answer, nats", _SINGLE, 40)
_TOKEN = Axis("log-ratio of the token, nats", ("token_logps",), 2, tokens=1)
_AXES = (
    Axis("log-ratio of chosen - rejected, nats", _PAIR, 40),
    Axis("reward of chosen - rejected", ("chosen_rewards",), 8),
    Axis("log-ratio of better - worse, nats", (*_SINGLE, "token_logps"), 40, rows=2),
    _ALONE,
    _TOKEN,
)
# What may be absent and would leave nothing to see, by what it goes with.
_ALSO = {"old_token_logps": "advantages", "forward_kl": "labels"}
_SIDES = ("chosen_", "rejected_")
_MOVING = ("logratios", "rewards", "logps", "token_logps")
_JUDGED = {"scores": (0.0, 1.0), "labels": (0, 1), "advantages": (-1.0, 1.0)}  # of bad and good
_TOKEN_LOGP = -3.0  # where it stands still
_STILL = {  # by how their names end
    "mask": 1,
    "token_weights": 1.0,
    "sample_weights": 1.0,
    "soft_labels": 1.0,
    "prompt_embeddings": 1.0,
    "steps": 1,
    "segments": 0,
    "groups": 0,
    "ties": 0,
    "token_kl": 0.0,
    "kl_logratios": 0.0,
    "forward_kl": 0.0,
    "values": 0.0,
}


def axis_of(key: str) -> Axis:
    """ValueError for what is no function of a margin."""
    entry = lookup(key)
    needed = [name for name, needed in quantities_of(entry.function).items() if needed]
    rows = 2 if "groups" in needed else 1
    known = all(_still(name, tokens=1) is not None for name in needed)
    if known and not entry.outputs and "values" not in entry.gradient_into:
        for axis in _AXES:
            moved = [entry.shapes[name][0] for name in axis.moved if name in needed]
            if axis.rows == rows and moved and "D" not in moved[0]:
                return axis
    got = ", ".join(needed)
    raise ValueError(f"{entry.key}: expected an objective of a margin or a log-ratio, got {got}")


def is_judged(key: str) -> bool:
    """Whether it reads one answer at a time, and is told whether that is good."""
    names = {*quantities_of(lookup(key).function)}
    return axis_of(key) in (_ALONE, _TOKEN) and bool(names & {*_JUDGED})


def curve(key: str, *, good: bool = True, **hyperparameters: Any) -> Curve:
    """161 margins, the objective's values there and d value / d margin, as lists of numbers.

    good: what a single answer is, for an objective that is told. hyperparameters: of the objective.
    Raises ValueError for an unknown key or hyperparameter, and an objective without a margin.
    """
    function, axis, entry = objectives.get(key, **hyperparameters), axis_of(key), lookup(key)
    known = quantities_of(entry.function)
    names = [name for name, needed in known.items() if needed or _ALSO.get(name) in known]
    found = Curve([], [], [])
    for x in torch.linspace(-axis.end, axis.end, _POINTS, dtype=torch.float64).unbind():
        margin = x.clone().requires_grad_()
        given = {name: _quantity(entry, name, axis, margin, good) for name in names}
        value = function(**given).sum()
        (gradient,) = torch.autograd.grad(value, margin, materialize_grads=True)
        for numbers, number in zip(found, (x, value, gradient), strict=True):
            numbers.append(number.item())
    return found


def _quantity(entry: Entry, name: str, axis: Axis, margin: Tensor, good: bool) -> Tensor:
    """Its value at a margin, of which an answer of two takes the half."""
    sizes = {"N": axis.rows, "T": axis.tokens, "K": 2}
    shape = [sizes.get(dimension, 1) for dimension in entry.shapes[name][0]]
    side = next((side for side in _SIDES if name.startswith(side)), "")
    kind = name.removeprefix(side)
    goods = [True, False] if axis.rows == 2 else [side == "chosen_" if side else good]
    still = _still(name, axis.tokens)
    assert still is not None, name  # axis_of has asked
    if kind in _MOVING:
        shares = [x - 0.5 for x in goods] if side or axis.rows == 2 else [1.0]
        length = axis.tokens if kind == "token_logps" else 1
        rows = still + margin.new_tensor(shares) * margin / length
    elif kind in _JUDGED:
        rows = torch.tensor([_JUDGED[kind][x] for x in goods])
    else:
        rows = torch.full((1,), still)
    return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def _still(name: str, tokens: int) -> float | None:
    """Where it stands; None for a quantity that no plain value says."""
    sums = {"token_logps": _TOKEN_LOGP, "logps": _TOKEN_LOGP * tokens, "lengths": tokens}
    table = {**sums, **_STILL, **dict.fromkeys(("logratios", "rewards", *_JUDGED), 0.0)}
    return next((value for end, value in table.items() if name.endswith(end)), None)


def plot(key: str, path: Path, **hyperparameters: Any) -> None:
    """Draws both into a file; the objective's hyperparameters may follow.

    Raises ValueError as `curve` does, where matplotlib is missing, and for a path it cannot write.
    """
    axis, judged = axis_of(key), is_judged(key)
    check_file("plot", path)  # matplotlib would write a picture beside a folder
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "plot: expected matplotlib, got none; pip install 'fastpo[plots]'"
        raise ValueError(message) from error
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), ("value", "gradient"), strict=True):
        axes.set_title(f"{lookup(key).key}: {title}", loc="left")
        axes.set_xlabel(axis.label)
        axes.axvline(0, color=_ZERO, linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    for good in (True, False) if judged else (True,):
        found = curve(key, good=good, **hyperparameters)
        colour = _GOOD if good else _BAD
        word = ("good answer" if good else "bad answer") if judged else None
        for axes, numbers in zip(figure.axes, found[1:], strict=True):
            axes.plot(found.margins, numbers, color=colour, linewidth=2, label=word)
    if judged:
        figure.axes[0].legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"plot: expected a picture's path, got {path}: {error}") from error

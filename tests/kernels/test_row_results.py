"""From a row's state to its results, and from their gradients to what the row kernel asks.

Against float64, as good as PyTorch's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from _triton import DEVICE, MARKS
from torch import Tensor

from fastpo.ops.rows import backend as R
from fastpo.ops.rows import torch as rows_torch
from fastpo.ops.rows import triton as rows_triton
from fastpo.testing import assert_as_good_as_eager

pytest.importorskip("triton")

from fastpo.kernels.finish import finish
from fastpo.kernels.row_grads import row_grads

pytestmark = MARKS

N = 300  # of several programs
STATS = ("entropy", "log_sum_sq_probs", "is_top1")
MAPS = {
    "plain": R.LogitMap(0.7),
    "softcap": R.LogitMap(softcap=30.0, logit_scale=-1.3),
    "of each row": R.LogitMap(softcap=9.0, inverse=torch.linspace(0.5, 2, N).double()),
}


def folded() -> Tensor:
    """States of softmaxes over 50 words: flat ones, peaked ones, labels high and low."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N, 50, generator=g) * torch.logspace(-3, 2, N).unsqueeze(1)
    labels = torch.randint(0, 50, (N,), generator=g)
    labels[::3] = z.argmax(1)[::3]
    state = R.filled_rows(R.INITIAL_STATE, N, z.device)
    rows_torch.forward(z, 0, labels, None, state, R.LogitMap(), 15, None, None, False)
    return state.to(DEVICE)


@pytest.mark.parametrize("stats", [STATS, ("entropy",), ()], ids=str)
@pytest.mark.parametrize("ignores", [False, True])
def test_results_match_float64(stats, ignores):
    state = folded()
    ignored = torch.arange(N, device=DEVICE) % 7 == 3 if ignores else None
    ours = rows_triton.finish(state, stats, ignored)
    eager = rows_torch.finish(state, stats, ignored)
    truth = rows_torch.finish(state.double(), stats, ignored)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        if name == "is_top1":
            assert torch.equal(ours[name], value)
        else:
            assert ours[name].dtype == torch.float32
            assert_as_good_as_eager(name, ours[name], eager[name], value)
        assert ignored is None or not ours[name][ignored].any()


def test_certain_labels_keep_their_digits():
    """From half the mass down to the smallest of float32, and none at all."""
    state = R.filled_rows(R.INITIAL_STATE, 40, torch.device(DEVICE))
    state[R.MAX] = state[R.TARGET] = 12.5
    state[R.OTHERS] = torch.logspace(0, -38, 40, device=DEVICE)
    state[R.OTHERS, -1] = 0.0
    found = rows_triton.finish(state, (), None)
    truth = -state[R.OTHERS].double().log1p()
    assert ((found["logps"] - truth).abs() <= truth.abs() * 2**-23).all()
    assert torch.equal(found["log_mass"], -found["logps"])


@pytest.mark.parametrize(
    ("field", "value"),
    [(R.TARGET, math.nan), (R.OTHERS, math.nan), (R.OTHERS, math.inf), (R.TARGET, -math.inf)],
)
def test_what_is_no_number_is_what_it_is_in_pytorch(field, value):
    state = folded()
    state[field, 5:7] = value  # of a label below the maximum, and of one that is it
    ours, eager = (x.finish(state, STATS, None) for x in (rows_triton, rows_torch))
    for name, expected in eager.items():
        assert torch.equal(ours[name].isnan(), expected.isnan()), name
        assert torch.equal(ours[name] == -math.inf, expected == -math.inf), name


def test_a_tie_before_the_label_and_an_entropy_below_0():
    state = folded()
    before = rows_triton.finish(state, STATS, None)
    assert before["is_top1"][6]
    state[R.BEFORE, 6] = state[R.TARGET, 6]
    state[R.MOMENT, 9] = 1e6  # as rounding may have it beside a label that is far below
    found = rows_triton.finish(state, STATS, None)
    assert not found["is_top1"][6] and found["entropy"][9] == 0
    assert torch.equal(found["entropy"][:9], before["entropy"][:9])


def exact(numbers: tuple) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in numbers]


@pytest.mark.parametrize("wanted", ["logps", "entropy", "lse", "all"])
@pytest.mark.parametrize("logit_map", MAPS)
def test_row_gradients_match_float64(logit_map, wanted):
    found = rows_torch.finish(folded(), ("entropy",), None)
    found["target"] *= 0.05  # inside the soft-cap
    numbers = (found[x] for x in ("logps", "maximum", "log_mass", "target"))
    saved = R.Saved(*numbers, found["entropy"] if wanted in ("entropy", "all") else None)
    g = torch.randn(3, N, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    names = R.Upstream._fields
    upstream = R.Upstream(*(g[i] if wanted in (x, "all") else None for i, x in enumerate(names)))
    ignored = torch.arange(N, device=DEVICE) % 5 == 1
    mapped = MAPS[logit_map]
    if mapped.inverse is not None:
        mapped = replace(mapped, inverse=mapped.inverse.to(DEVICE))
    given = (mapped, ignored)
    ours = rows_triton.row_grads(saved, upstream, *given)
    eager = rows_torch.row_grads(saved, upstream, *given)
    truth = rows_torch.row_grads(R.Saved(*exact(saved)), R.Upstream(*exact(upstream)), *given)
    assert torch.equal(ours[:, ignored], eager[:, ignored])
    ours, eager, truth = (x[:, ~ignored] for x in (ours, eager, truth))
    for i in range(R.GRADS):
        assert_as_good_as_eager(f"row {i}", ours[i], eager[i], truth[i])


def test_gradients_of_certain_labels_keep_their_digits():
    """And of labels without any mass."""
    logps = torch.cat((-torch.logspace(-38, 3, 42), torch.tensor([0.0, -math.inf]))).to(DEVICE)
    zeros, ones = torch.zeros_like(logps), torch.ones_like(logps)
    saved, wide = R.Saved(logps, zeros, zeros, zeros, zeros), logps.double()
    for upstream, truth in (
        (R.Upstream(ones, None, None), -torch.expm1(wide)),
        (R.Upstream(None, ones, None), -wide.exp() * wide.clamp_min(R.LOG_FLOOR)),
    ):
        found = rows_triton.row_grads(saved, upstream, R.LogitMap(), None)[R.LABEL]
        assert ((found - truth).abs() <= truth * 2**-23 + 2**-149).all()


@pytest.mark.parametrize("n", [1, 256, N])
def test_writes_inside_its_slice(n):
    """All of it: as long as programs, and longer."""
    state, ignored = folded()[:, :n], torch.arange(n, device=DEVICE) % 7 == 3
    results = rows_triton.finish(state, STATS, ignored)
    wide = {x: torch.full((n + 2,), 1, device=DEVICE).to(y.dtype) for x, y in results.items()}
    finish(state, ignored, {x: y[1:-1] for x, y in wide.items()})
    saved = R.Saved(*(results[x] for x in ("logps", "maximum", "log_mass", "target", "entropy")))
    upstream = R.Upstream(results["lse"], None, None)
    grads = torch.full((R.GRADS, n + 2), 1.0, device=DEVICE)
    given = {"inverse": None, "softcap": False, "cap": 0.0, "factor": 1.0}
    row_grads(saved, upstream, ignored, grads[:, 1:-1], **given)
    expected = rows_triton.row_grads(saved, upstream, R.LogitMap(), ignored)
    for found, inside in ((grads, expected), *((wide[x], results[x]) for x in results)):
        assert torch.equal(found[..., 1:-1], inside)
        assert (found[..., [0, -1]] == 1).all()


def test_no_rows():
    nothing = torch.empty(0, device=DEVICE)
    assert len(rows_triton.finish(torch.empty(R.STATE, 0, device=DEVICE), (), None)["logps"]) == 0
    saved, upstream = R.Saved(*[nothing] * 4, None), R.Upstream(nothing, None, None)
    assert rows_triton.row_grads(saved, upstream, R.LogitMap(), None).shape == (R.GRADS, 0)

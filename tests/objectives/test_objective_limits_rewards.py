"""Limits and identities of the reward models, and TRL's own value."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from _objective_truth import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import available, get

few = settings(max_examples=15, deadline=None)
numbers = st.floats(-30, 30, allow_nan=False)
columns = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64).unbind(-1)
)
bt = get("bt")


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


@given(sides=columns)
@few
def test_bradley_terry_is_dpo_on_rewards(sides):
    won, lost = sides
    dpo = get("dpo", beta=1.0)
    labels, margins = torch.full_like(won, 0.3), torch.linspace(-1, 2, len(won)).double()
    close(bt(won, lost), dpo(won, lost))
    close(bt(won, lost, margins, labels), dpo(won, lost, labels, margins))
    close(bt(won, lost, soft_labels=1 - labels), bt(lost, won, soft_labels=labels))
    half = torch.full_like(won, 0.5)  # RRM's tie
    close(bt(won, lost, soft_labels=half), bt(lost, won, soft_labels=half))
    close(bt(won, lost, center_coef=0.2) - bt(won, lost), 0.2 * (won + lost).square(), atol=1e-6)
    assert bt(won, -won).shape == won.shape


@given(sides=columns, theta=st.floats(1.001, 50))
@few
def test_ties_share_the_probability(sides, theta):
    won, lost = sides
    tie = torch.ones(len(won), dtype=torch.bool)
    loss = get("bt_ties", theta=theta)
    total = sum(
        (-rows).exp()
        for rows in (loss(won, lost, ~tie), loss(lost, won, ~tie), loss(won, lost, tie))
    )
    close(total, torch.ones_like(total))
    close(get("bt_ties", theta=1 + 1e-13)(won, lost, ~tie), bt(won, lost), atol=1e-9)
    assert get("bt_ties", theta=1e200)(won, lost, tie).isfinite().all()
    with pytest.raises(ValueError, match=r"^theta: expected a number in \(1, inf\), got 1.0"):
        get("bt_ties", theta=1.0)


@given(sides=columns)
@few
def test_heads_that_are_one_reward(sides):
    """Every vector head has a shape in which it is Bradley-Terry."""
    won, lost = sides
    one, zero = torch.ones_like(won), torch.zeros_like(won)

    def head(*parts):
        return torch.stack(parts, 1)

    plain = bt(won, lost)
    close(get("gpm", tau=1.0)(head(won, one), head(lost, one)), plain)
    close(get("gpm", tau=0.5)(head(won, one), head(lost, one), head(one / 2)), plain)
    close(
        get("gpm", tau=1.0, margin=0.7)(head(won, one), head(lost, one)), bt(won, lost, 0.7 * one)
    )
    user = head(zero, one)
    close(get("lore")(head(zero, won), head(one, lost), user), plain)
    close(get("vpl")(won, lost, head(zero, zero), head(zero, zero)), plain)
    groups = torch.zeros(len(won), dtype=torch.int64)
    close(get("maxmin_rm")(head(won), head(lost), groups), plain)
    # |0 - a|² - |f - a|² = 2a·f - f²
    close(get("pal")(head(won), head(zero), head(one)), bt(2 * won - won.square(), zero), atol=1e-7)
    close(get("eurus_rm")(won, lost) - plain, bt(won, zero) + bt(zero, lost))


def test_circular_preferences():
    """a over b over c over a: no scalar reward can say it."""
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    points = torch.stack([angles.cos(), angles.sin()], 1)
    loss = get("gpm", tau=1.0)(points, points.roll(-1, 0))
    assert (loss < math.log(2)).all()
    swapped = get("gpm", tau=1.0)(points.roll(-1, 0), points)
    close((-loss).exp() + (-swapped).exp(), torch.ones(3, dtype=torch.float64))


def test_the_annotators_head():
    won = torch.tensor([[3.0, -1.0], [2.0, -1.0], [-1.0, 4.0], [0.0, 0.0]], requires_grad=True)
    groups = torch.tensor([0, 0, 2, 3])
    rows = get("maxmin_rm")(won, torch.zeros(4, 2), groups)
    close(rows, -F.logsigmoid(torch.tensor([3.0, 2.0, 4.0, 0.0])), rtol=1e-6)
    (gradient,) = torch.autograd.grad(rows.sum(), won)
    assert (gradient != 0).tolist() == [[True, False], [True, False], [False, True], [True, False]]


@given(sides=columns)
@few
def test_an_outside_option(sides):
    r, s = sides
    groups = torch.arange(len(r))
    yes = torch.ones(len(r), dtype=torch.bool)
    loss = get("contextual_quality")
    zero = torch.zeros_like(r)
    close(loss(r, yes, groups), bt(r, zero))
    close(loss(r, ~yes, groups), bt(zero, r))
    two, choice = torch.stack([r, s], 1).flatten(), torch.stack([yes, ~yes], 1).flatten()
    expected = torch.stack([zero, r, s], 1).logsumexp(1)
    close(loss(two, choice, groups.repeat_interleave(2)), expected - r)
    close(loss(two, yes.repeat_interleave(2), groups.repeat_interleave(2)), expected - (r + s) / 2)
    padded = loss(r, yes, groups, num_groups=len(r) + 2)
    close(padded, torch.cat([loss(r, yes, groups), torch.zeros(2, dtype=r.dtype)]))


@given(sides=columns)
@few
def test_ranking_two_is_choosing(sides):
    won, lost = sides
    groups = torch.arange(len(won)).repeat_interleave(2)
    both = torch.stack([lost, won], 1).flatten()
    scores = torch.tensor([0.0, 1.0], dtype=both.dtype).repeat(len(won))
    close(get("rm_listmle")(both, scores, groups), bt(won, lost))
    level = get("rm_listmle")(both, 0 * scores, groups)  # equal scores: in row order
    close(level, bt(lost, won))


def test_listmle_is_dpo_plackett_luce():
    if "dpo_plackett_luce" not in available():
        pytest.skip("dpo_plackett_luce is not in the table")
    q = make_inputs(get("rm_listmle"))
    luce = get("dpo_plackett_luce", beta=1.0)
    close(get("rm_listmle")(**q), luce(q["rewards"], q["scores"], q["groups"]))


def test_listmle_is_a_distribution_over_rankings():
    rewards = torch.tensor([1.0, -2.0, 0.5, 300.0], dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(4)):
        scores = torch.tensor(order, dtype=torch.float64)
        total += (-get("rm_listmle")(rewards, scores, torch.zeros(4, dtype=torch.int64))).exp()
    close(total, torch.ones(1, dtype=torch.float64))


@given(sides=columns)
@few
def test_restricted_ce(sides):
    logits = torch.stack(sides, 1)
    ids = torch.arange(len(logits)) % 2
    for e in (0.0, 0.3):
        expected = F.cross_entropy(logits, ids, reduction="none", label_smoothing=e)
        close(get("restricted_ce", label_smoothing=e)(logits, ids), expected)
    chosen, other = (logits.gather(1, i[:, None])[:, 0] for i in (ids, 1 - ids))
    close(get("gram", label_smoothing=0.0)(logits, ids), bt(chosen, other))
    for outside in (ids - 100, ids + 2):
        with pytest.raises(ValueError, match=r"label_ids: expected ids in \[0, 2\), got"):
            get("restricted_ce")(logits, outside)


def test_shapes_of_heads():
    """A quantity that may be a scalar or a vector elsewhere has one shape in each entry."""
    x, v, g = torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^chosen_rewards: expected shape \(B,\), got \(3, 4\)$"):
        bt(v, v)
    with pytest.raises(
        ValueError, match=r"^rejected_rewards: expected shape \(3,\), got \(3, 4\)$"
    ):
        bt(x, v)
    with pytest.raises(ValueError, match=r"^chosen_rewards: expected shape \(B, D\), got \(3,\)$"):
        get("gpm")(x, x)
    with pytest.raises(ValueError, match=r"^chosen_rewards: expected an even width, got \(3, 3\)$"):
        get("gpm")(v[:, :3], v[:, :3])
    with pytest.raises(ValueError, match=r"^eigenvalues: expected shape \(3, 2\), got \(3, 4\)$"):
        get("gpm")(v, v, v)
    with pytest.raises(ValueError, match=r"^groups: expected shape \(3,\), got \(2,\)$"):
        get("maxmin_rm")(v, v, g[:2])
    with pytest.raises(ValueError, match=r"^rewards: expected shape \(N,\), got \(3, 4\)$"):
        get("contextual_quality")(v, g, g)
    with pytest.raises(ValueError, match=r"^rewards: expected shape \(N, M\), got \(3,\)$"):
        get("rm_regression")(x, v)


@pytest.mark.parametrize("coef", [None, 0.01])
@pytest.mark.parametrize("margin", [True, False])
def test_reward_trainer_of_trl(coef, margin):
    trl = pytest.importorskip("trl.trainer.reward_trainer")
    logits = torch.randn(8, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    margins = torch.linspace(-1, 2, 4)

    class Scores(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=logits)

    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    names = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
    stub = SimpleNamespace(
        model=torch.nn.Module().eval(),
        args=SimpleNamespace(center_rewards_coefficient=coef),
        accelerator=accelerator,
        _metrics={"eval": {name: [] for name in names}},
        _total_train_tokens=0,
    )
    inputs = {"margin": margins} if margin else {}
    expected = trl.RewardTrainer.compute_loss(stub, Scores(), inputs)
    won, lost = logits[:4, 0], logits[4:, 0]
    loss = get("reward")(won, lost, margins if margin else None, center_coef=coef or 0.0).mean()
    close(loss, expected, rtol=1e-6, atol=1e-7)
    gradients = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
    close(*gradients, rtol=1e-6, atol=1e-7)

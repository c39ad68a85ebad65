"""Groups: identities, invariances, and any grouping with ties against the truth."""

import math
from functools import partial

import _objective_truth_groups  # noqa: F401, enters its rows
import pytest
import torch
from _objective_truth import ROWS, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import available, get
from fastpo.objectives._math import group_log_softmax, group_logsumexp, group_max
from fastpo.objectives._registry import quantities_of

KEYS = available("groups")
CASES = [(key, i) for key in KEYS for i in range(len(ROWS[key].cases))]
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)
sizes = st.lists(st.integers(0, 4), min_size=1, max_size=4)
numbers = st.floats(-30, 30, allow_nan=False)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-8, "atol": 1e-9, **tolerance})


def grouping(sizes):
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def problem(key, sizes, seed=0, *, tied=False, extreme=False):
    """Quantities of groups of these sizes; tied: scores that are often equal."""
    groups = grouping(sizes)
    q = make_inputs(get(key), seed=seed, N=len(groups), extreme=extreme) | {"groups": groups}
    if tied and "scores" in q:
        q["scores"] = q["scores"].round()
    return q


def leaves_of(q):
    return {n: q[n].requires_grad_() for n in ("logps", "logratios", "token_logps") if n in q}


def evaluate(function, q, **hyper):
    leaves = leaves_of(q)
    rows = function(**q, **hyper)
    grads = torch.autograd.grad((rows * torch.arange(1, len(rows) + 1)).sum(), leaves.values())
    return rows.detach(), dict(zip(leaves, grads, strict=True))


def truth_of(key, q, **hyper):
    names = quantities_of(get(key))
    return evaluate(lambda **q: ROWS[key].function(*(q[n] for n in names), **hyper), q)


@pytest.mark.parametrize(("key", "case"), CASES)
@given(sizes=sizes, seed=seeds, tied=st.booleans())
@few
def test_any_grouping_with_ties(key, case, sizes, seed, tied):
    hyper = {**ROWS[key].cases[case], "num_groups": len(sizes)}
    q = problem(key, sizes, seed, tied=tied)
    (got, dgot), (expected, dexpected) = evaluate(get(key), q, **hyper), truth_of(key, q, **hyper)
    close(got, expected.to(got.dtype))
    for name in dexpected:
        close(dgot[name], dexpected[name])
    empty = torch.tensor(sizes) == 0
    assert got[empty].abs().sum() == 0


@pytest.mark.parametrize("key", KEYS)
@given(sizes=sizes, seed=seeds)
@few
def test_extremes_of_any_grouping(key, sizes, seed):
    q = problem(key, sizes, seed, extreme=True)
    q = {n: x.float() if x.is_floating_point() else x for n, x in q.items()}
    rows, grads = evaluate(get(key), q, num_groups=len(sizes))
    assert rows.isfinite().all()
    assert all(x.isfinite().all() for x in grads.values())


@pytest.mark.parametrize("key", KEYS)
@given(sizes=sizes, seed=seeds, data=st.data())
@few
def test_order_inside_a_group(key, sizes, seed, data):
    q = problem(key, sizes, seed)
    rows = st.permutations(range(len(q["groups"])))
    order = torch.tensor(data.draw(rows), dtype=torch.int64)
    order = order[q["groups"][order].argsort(stable=True)]
    shuffled = {n: x[order] for n, x in q.items()}
    count = len(sizes)
    close(get(key)(**shuffled, num_groups=count), get(key)(**q, num_groups=count))


@pytest.mark.parametrize("key", KEYS)
@given(sizes=sizes, seed=seeds)
@few
def test_groups_do_not_see_each_other(key, sizes, seed):
    q = problem(key, sizes, seed, tied=True)
    together = get(key)(**q, num_groups=len(sizes) + 2)
    assert together[len(sizes) :].abs().sum() == 0
    if key == "trpa":  # its means are the batch's
        return
    for g in range(len(sizes)):
        alone = {n: x[q["groups"] == g] for n, x in q.items()}
        alone["groups"] = torch.zeros_like(alone["groups"])
        close(together[g : g + 1], get(key)(**alone, num_groups=1))


@pytest.mark.parametrize("key", KEYS)
def test_num_groups_may_be_read(key):
    q = problem(key, [2, 0, 3])
    close(get(key)(**q), get(key)(**q, num_groups=3))


@pytest.mark.parametrize("key", KEYS)
def test_no_row_falls_out_of_a_number_of_groups(key):
    q = problem(key, [2, 0, 3])
    with pytest.raises(ValueError, match=r"^groups: expected ids below num_groups = 2, got 2"):
        get(key)(**q, num_groups=2)


@pytest.mark.parametrize("num_groups", [None, 3])
@pytest.mark.parametrize("key", KEYS)
def test_groups_rise_from_0_on(key, num_groups):
    """Their rows are found by a search: others would be taken for theirs."""
    q = problem(key, [2, 0, 3])
    for groups, got in (([0, 2, 0, 2, 2], "0 in row 2"), ([-1, -1, 2, 2, 2], "-1 in row 0")):
        with pytest.raises(
            ValueError, match=f"^groups: expected ids that rise from 0 on, got {got}$"
        ):
            get(key)(**q | {"groups": torch.tensor(groups)}, num_groups=num_groups)
    with pytest.raises(
        ValueError, match=r"^groups: expected dtype torch.int64, got torch.float32$"
    ):
        get(key)(**q | {"groups": q["groups"].float()}, num_groups=num_groups)
    close(get(key)(**q | {"groups": q["groups"].to(torch.int16)}), get(key)(**q))


@pytest.mark.parametrize(
    "key", [*(key for key in KEYS if "scores" in quantities_of(get(key))), "rm_listmle"]
)
def test_a_score_that_is_not_known(key):
    """It is neither above nor below another: to some it was the best of its group."""
    q = problem(key, [2, 0, 3])
    q["scores"] = q["scores"].index_fill(0, torch.tensor(3), math.nan)
    with pytest.raises(ValueError, match=r"^scores: expected numbers, got NaN in row 3$"):
        get(key)(**q, num_groups=3)


@pytest.mark.parametrize("key", KEYS)
def test_a_model_that_says_nan_is_heard_in_its_group_alone(key):
    q = problem(key, [3, 2])
    if "scores" in q:
        q["scores"] = torch.tensor([0.0, 2.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    q |= {"labels": torch.tensor([0, 1, 0, 1, 0]), "mask": torch.ones(5, 5)}
    q = {name: q[name] for name in quantities_of(get(key))}
    for x in (leaves := leaves_of(q)).values():
        x.data[1] = math.nan
    rows = get(key)(**q)
    assert rows.isnan().tolist() == [True, False]
    for gradient in torch.autograd.grad(rows[1], leaves.values(), allow_unused=True):
        assert gradient is None or gradient[3:].isfinite().all()


@pytest.mark.parametrize("key", ["pro_ranking", "swepo"])
def test_an_infinite_score_is_heard_in_its_group_alone(key):
    q = problem(key, [3, 2]) | {"scores": torch.tensor([0.0, math.inf, 1.0, 1.0, 2.0]).double()}
    (leaf,) = leaves_of(q).values()
    rows = get(key)(**q)
    assert rows.isfinite().tolist() == [False, True]
    assert torch.autograd.grad(rows[1], leaf)[0].isfinite()[3:].all()


@pytest.mark.parametrize("key", ["infonca", "swepo", "dpo_plackett_luce"])
def test_a_number_of_groups_keeps_the_graph_whole(key):
    """The check of the ids would read them in the middle of it."""
    q = problem(key, [2, 0, 3])
    whole = torch.compile(partial(get(key), num_groups=3), fullgraph=True, backend="eager")
    close(whole(**q), get(key)(**q))


@pytest.mark.parametrize("key", ["dpo_plackett_luce", "knowpat", "pro_ranking"])
def test_equal_scores_rank_in_row_order(key):
    q = problem(key, [3])
    level, ranks = q | {"scores": torch.zeros(3)}, q | {"scores": torch.tensor([3.0, 2.0, 1.0])}
    if key == "pro_ranking":  # the gaps of equal scores are 0: log 3 + log 2, and the first's NLL
        expected = math.log(6) - 0.05 * 4 * q["logps"][:1]
    else:
        expected = get(key)(**ranks)
    close(get(key)(**level), expected)


@pytest.mark.parametrize("key", sorted(set(KEYS) - {"lambda_rank", "mdpo_multisample"}))
@given(sizes=sizes, seed=seeds, shift=numbers)
@few
def test_a_common_shift_of_the_scores_changes_nothing(key, sizes, seed, shift):
    q = problem(key, sizes, seed)
    moved = q | {"scores": q["scores"] + shift}
    a, b = {"num_groups": len(sizes)}, {"num_groups": len(sizes)}
    if key == "trpa":
        a["top_score"], b["top_score"] = 0.1, 0.1 + shift
    close(get(key)(**moved, **b), get(key)(**q, **a), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("key", ["dpo_plackett_luce", "aft", "knowpat"])
@given(sizes=sizes, seed=seeds)
@few
def test_only_the_order_of_the_scores_matters(key, sizes, seed):
    q = problem(key, sizes, seed, tied=True)
    bent = q | {"scores": (q["scores"] / 3).exp()}
    close(get(key)(**bent, num_groups=len(sizes)), get(key)(**q, num_groups=len(sizes)))


@pytest.mark.parametrize(
    "key", ["infonca", "dpo_plackett_luce", "swepo", "lambda_rank", "mdpo_multisample", "brain"]
)
@given(sizes=sizes, seed=seeds, shift=numbers)
@few
def test_a_prompts_partition_function_cancels(key, sizes, seed, shift):
    q = problem(key, sizes, seed, tied=True)
    name = "logps" if key == "brain" else "logratios"
    moved = q | {name: q[name] + shift * torch.cos(q["groups"].double())}
    close(get(key)(**moved, num_groups=len(sizes)), get(key)(**q, num_groups=len(sizes)))


@pytest.mark.parametrize("key", KEYS)
def test_alone_in_a_group(key):
    q = problem(key, [1, 1, 1, 1], seed=5)
    rows = get(key)(**q)
    if key == "nca":
        h = 0.1 * q["logratios"]
        close(rows, -torch.nn.functional.logsigmoid(h) - torch.nn.functional.logsigmoid(-h))
    elif key in ("aft", "knowpat"):
        close(rows, -q["logps"] / q["lengths"].clamp(min=1))
    elif key == "trpa":
        assert get(key)(**q, kl_coef=0.0).abs().sum() == 0
    else:
        assert rows.abs().sum() == 0


def two(seed, n=4):
    """n groups, a worse row before a better one: worse, better, both in turn, scores, groups."""
    g = torch.Generator().manual_seed(seed)
    lost, won = 3 * torch.randn(2, n, generator=g, dtype=torch.float64)
    scores = torch.tensor([0.2, 1.4], dtype=torch.float64).repeat(n)
    return lost, won, torch.stack([lost, won], 1).flatten(), scores, grouping([2] * n)


@given(seed=seeds)
@few
def test_two_rows_are_a_pair(seed):
    lost, won, x, s, groups = two(seed)
    hard, dpo = {"alpha": 1e-4}, get("dpo")(won, lost, beta=0.7)
    close(get("infonca")(x, s, groups, beta=0.7, **hard), dpo)
    close(get("nca")(x, s, groups, beta=0.7, **hard), get("nca_pair")(won, lost, beta=0.7))
    close(get("dpo_plackett_luce")(x, s, groups, beta=0.7), dpo)
    for power in (0, 1, 2):  # both are equally far from the mean
        close(get("swepo")(x, s, groups, beta=0.7, power=power), dpo)
    weight = (2**1.4 - 2**0.2) * (1 / math.log(2) - 1 / math.log(3))
    for rank_by in ("scores", "model"):
        close(get("lambda_rank")(x, s, groups, beta=0.7, rank_by=rank_by), weight * dpo)
    label = s > 1
    close(get("mdpo_multisample")(x, label, groups, beta=0.7), dpo)
    ipo = get("mdpo_multisample")(x, label.long(), groups, beta=0.7, loss="ipo")
    close(ipo, get("ipo")(won, lost, beta=0.7))
    soft = torch.sigmoid(torch.full_like(won, 1.2 / 0.8))
    close(
        get("infonca")(x, s, groups, beta=0.7, alpha=0.8),
        get("dpo")(won, lost, soft_labels=soft, beta=0.7),
    )


@given(seed=seeds)
@few
def test_two_rows_of_log_probabilities_are_a_pair(seed):
    lost, won, x, s, groups = two(seed)
    n = torch.tensor([3, 2]).repeat(len(won))
    mean_lost, mean_won = lost / 3, won / 2
    dpo = get("dpo")(mean_won, mean_lost, beta=1.2)
    close(get("pro_ranking")(x, n, s, groups, sft_weight=0.5), dpo - 0.5 * won)
    plain = get("dpo")(mean_won, mean_lost, beta=1.0) - mean_won
    close(get("aft")(x, n, s, groups, variant="plain"), plain)
    close(get("aft")(x, n, s, groups, variant="detached"), plain)
    softplus = torch.nn.functional.softplus
    pull = (softplus(-mean_won) + softplus(mean_lost)) * (mean_won > mean_lost)
    close(get("knowpat")(x, n, s, groups, lam=0.3), 0.3 * pull - mean_won)


@given(sizes=sizes, seed=seeds)
@few
def test_divergences_vanish_at_their_targets(sizes, seed):
    q = problem("infonca", sizes, seed)
    kl = get("infonca", beta=0.4, alpha=0.7, subtract_entropy=True, num_groups=len(sizes))
    assert (kl(**q) >= -1e-12).all()
    reached = q | {"logratios": q["scores"] / (0.4 * 0.7)}
    close(kl(**reached), torch.zeros(len(sizes), dtype=torch.float64))
    q = problem("brain", sizes, seed)
    brain = get("brain", temperature=0.3, num_groups=len(sizes))
    assert (brain(**q) >= -1e-12).all()
    reached = q | {"logps": q["ref_logps"] + q["scores"] / 0.3}
    close(brain(**reached), torch.zeros(len(sizes), dtype=torch.float64))


def test_a_score_of_minus_infinity_leaves_a_row_out_of_the_target():
    """As ADPO's log q of a teacher that excludes a response: q·log q is 0 there."""
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    groups, scores = grouping([3]), torch.tensor([0.3, -math.inf, -0.2]).double()
    q, p = scores.softmax(0)[[0, 2]], x.log_softmax(0)[[0, 2]]
    expected = (q * (q.log() - p)).sum()[None]
    close(get("infonca", alpha=1.0, subtract_entropy=True)(x, scores, groups, beta=1.0), expected)
    close(get("brain")(x, 0 * x, 0 * x, scores, groups), expected)


def test_infonca_one_hot_splits_ties():
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    groups, scores = grouping([3]), torch.tensor([1000.1, 0.0, 1000.1])
    expected = -x.log_softmax(0)[[0, 2]].mean()[None]
    close(get("infonca")(x, scores, groups, beta=1.0, alpha=1e-4), expected)


def test_swepo_at_the_mean_is_negative():
    x, scores = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 2.0])
    rows = get("swepo")(x, scores, grouping([3]), beta=1.0, alpha=0.0)
    close(rows, -x.log_softmax(0)[2:])


def test_swepo_of_strengths_beyond_float32():
    """0·inf would be NaN."""
    x, scores = torch.tensor([0.3, -0.2]), torch.tensor([1e4, -1e4])
    rows = get("swepo")(x, scores, grouping([2]), beta=1.0, alpha=0.0, power=10)
    close(rows, torch.tensor([0.5]).neg().exp().log1p())


def test_swepo_without_a_positive():
    x = torch.tensor([1.0, -2.0, 0.5, 7.0], requires_grad=True)
    rows = get("swepo")(x, torch.full((4,), 0.1), grouping([3, 1]))
    rows.sum().backward()
    assert rows.tolist() == [0, 0]
    assert x.grad.abs().sum() == 0


@pytest.mark.parametrize(("below", "sign"), [(0.2, 1.0), (0.3, 0.0), (0.5, -1.0)])
def test_afts_boundary(below, sign):
    """The push down on a worse row balances the pull up β = 0.3 below the weakest better one."""
    s = torch.tensor([-2.0, -2.0 - below], dtype=torch.float64, requires_grad=True)
    one, scores = torch.ones(2, dtype=torch.int64), torch.tensor([1.0, 0.0])
    get("aft")(s, one, scores, grouping([2]), beta=0.3).sum().backward()
    push = s.grad[1]
    assert push.sign() == sign if sign else push.abs() < 1e-12


@given(sizes=sizes, seed=seeds, spare=st.integers(0, 3))
@few
def test_trpa_is_a_batch_mean(sizes, seed, spare):
    q = problem("trpa", sizes, seed, tied=True)
    trpa = get("trpa", kl_coef=0.5, num_groups=len(sizes) + spare)
    rows = range(len(q["groups"]))
    rho = ((q["token_logps"] - q["ref_token_logps"]) * q["mask"]).sum(1)
    rho = rho / q["mask"].sum(1).clamp(min=1)
    pairs = [
        get("dpo")(rho[i, None], rho[j, None], beta=0.25 if q["scores"][i] >= 1 else 0.1)
        for i in rows
        for j in rows
        if q["groups"][i] == q["groups"][j] and q["scores"][i] > q["scores"][j]
    ]
    x = (q["old_token_logps"] - q["token_logps"])[q["mask"]]
    kl = (x.expm1() - x).sum() / max(len(x), 1)
    ranking = torch.cat([kl.new_zeros(1), *pairs]).sum() / max(len(pairs), 1)
    close(trpa(**q).mean(), ranking + 0.5 * kl)


def test_lambda_rank_beyond_the_cap():
    x = torch.tensor([0.5, -0.5], requires_grad=True)
    rows = get("lambda_rank")(x, torch.tensor([401.0, 400.0]), grouping([2]))
    rows.sum().backward()
    assert rows.isfinite().all()
    assert x.grad.abs().min() > 0


def test_segment_functions():
    groups, x = grouping([2, 0, 3]), torch.tensor([1.0, 90.0, -math.inf, -2.0, -200.0])
    x.requires_grad_()
    lse = group_logsumexp(x, groups, 4)
    close(lse[[0, 2]], torch.tensor([90.0, -2.0]))
    assert lse[[1, 3]].tolist() == [-math.inf] * 2
    (gradient,) = torch.autograd.grad(lse[[0, 2]].sum(), x)
    assert gradient.isfinite().all()
    assert gradient[2] == 0
    nothing = torch.full((2, 3), -math.inf, requires_grad=True)
    out = group_logsumexp(nothing, groups[:2], 1)
    assert torch.autograd.grad(out.clamp(min=-1).sum(), nothing)[0].abs().sum() == 0
    y = torch.randn(5, 3, dtype=torch.float64)
    both = torch.stack([y[:2].logsumexp((0, 1)), y[2:].logsumexp((0, 1))])
    close(group_logsumexp(y, groups, 3)[[0, 2]], both)
    assert group_max(x, groups, 4).tolist() == [90.0, -math.inf, -2.0, -math.inf]
    assert group_log_softmax(torch.tensor([123.456]), groups[:1], 1).tolist() == [0]
    far = group_log_softmax(torch.full((2,), 3e6), groups[:2], 1)
    assert far.tolist() == [pytest.approx(-math.log(2))] * 2

"""Single responses: identities, one kind of label only, and long rows."""

import math

import pytest
import torch
from _objective_truth import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import available, get
from fastpo.objectives._registry import quantities_of

LABELLED = [key for key in available("singles") if "labels" in quantities_of(get(key))]
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradient(rows, x):
    return torch.autograd.grad(rows.sum(), x)[0]


@pytest.mark.parametrize("key", [*LABELLED, "mdpo_multisample", "contextual_quality"])
def test_labels_that_are_no_truths(key):
    """-1 and 1 are how others write them, and -1 was a yes."""
    q = make_inputs(get(key))
    numbers = q["labels"].int()
    torch.testing.assert_close(get(key)(**q | {"labels": numbers}), get(key)(**q))
    numbers[2:4] = torch.tensor([1, -1])
    expected = "numbers in \\[0, 1\\]" if key == "pointwise_dpo" else "0 or 1"
    for labels in (numbers, numbers.float().masked_fill(numbers == -1, math.nan)):
        with pytest.raises(ValueError, match=rf"^labels: expected {expected}, got \S+ in row 3$"):
            get(key)(**q | {"labels": labels})


@pytest.mark.parametrize("key", LABELLED)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("label", [False, True])
def test_one_kind_of_label(key, extreme, label):
    q = make_inputs(get(key), extreme=extreme)
    q["labels"] = torch.full_like(q["labels"], label)
    q = {n: x.float() if x.is_floating_point() else x for n, x in q.items()}
    names = [n for n in ("logps", "logratios") if n in q]
    leaves = [q[n].requires_grad_() for n in names]
    rows = get(key)(**q)
    grads = torch.autograd.grad(rows.sum(), leaves, allow_unused=True)
    assert all(x.isfinite().all() for x in (rows, *grads) if x is not None)


@pytest.mark.parametrize("key", LABELLED)
def test_labels_may_be_numbers(key):
    q = make_inputs(get(key))
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        assert torch.equal(get(key)(**{**q, "labels": q["labels"].to(dtype)}), get(key)(**q))


@given(seed=seeds)
@few
def test_weights_of_nll(seed):
    q = make_inputs(get("weighted_nll"), seed=seed)
    logps, n, w = q["logps"], q["lengths"], q["sample_weights"]
    for reduction in ("mean", "sum", "batch"):
        rows = get("nll")(logps, n, reduction=reduction)
        close(get("weighted_nll")(logps, n, torch.ones_like(w), reduction=reduction), rows)
    mean = get("weighted_nll")(logps, n, w, reduction="batch").mean()
    close(mean, -(w * logps).sum() / n.sum().clamp(min=1))


def test_dft_weighs_by_probability():
    logps = leaf([-1.0, -5.0], [0.0, -0.3])
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    p = logps.detach().exp()
    rows = get("dft")(logps, mask)
    close(rows.mean(), -(p * logps * mask).sum() / 3)
    close(gradient(rows, logps), -2 / 3 * p * mask)
    assert get("dft")(logps, mask & False).tolist() == [0, 0]


@given(seed=seeds, gamma=st.floats(0, 1))
@few
def test_ift_counts_scored_tokens_only(seed, gamma):
    q = make_inputs(get("ift"), seed=seed, N=3, T=9)
    for x, m, row in zip(q["token_logps"], q["mask"], get("ift")(**q, gamma=gamma), strict=True):
        dense = torch.ones(1, int(m.sum())).bool()
        close(get("ift")(x[m][None], dense, gamma=gamma)[0], row)


def test_ift_between_self_weighted_and_uniform():
    logps = leaf([-1.0, -2.0, -3.0])
    mask = torch.ones(1, 3).bool()
    close(get("ift")(logps, mask, gamma=0.0), leaf(14 / 6))
    close(get("ift")(logps, mask, gamma=1.0), leaf((6 * 1 + 5 * 2 + 3 * 3) / 14))
    close(get("ift")(1e-9 * logps, mask), 1e-9 * get("ift")(logps, mask), atol=0.0)
    fixed = gradient(get("ift")(logps, mask, gamma=1.0, detach_weights=True), logps)
    close(fixed, -torch.tensor([[6.0, 5.0, 3.0]], dtype=torch.float64) / 14)


@pytest.mark.parametrize("gamma", [0.0, 0.95, 0.999, 1.0])
def test_ift_on_a_long_row(gamma):
    g = torch.Generator().manual_seed(0)
    losses = torch.rand(1, 3001, generator=g, dtype=torch.float64)
    weights = torch.zeros_like(losses)
    weights[:, -1] = losses[:, -1]
    for t in reversed(range(3000)):
        weights[:, t] = losses[:, t] + gamma * weights[:, t + 1]
    expected = (weights * losses).sum(-1) / weights.sum(-1)
    mask = torch.ones_like(losses).bool()
    close(get("ift")(-losses, mask, gamma=gamma), expected)
    close(get("ift")(-losses.float(), mask, gamma=gamma), expected.float(), rtol=1e-5)


@pytest.mark.parametrize("key", ["dft", "ift"])
def test_certainty_and_emptiness(key):
    for width in (0, 1, 3):
        logps = torch.zeros(2, width, requires_grad=True)
        for mask in (torch.ones(2, width).bool(), torch.zeros(2, width).bool()):
            rows = get(key)(logps, mask)
            assert rows.tolist() == [0, 0]
            assert gradient(rows, logps).isfinite().all()


@given(seed=seeds, scale=st.floats(0.1, 10))
@few
def test_guided_mle(seed, scale):
    guided = get("preference_guided_mle")
    q = make_inputs(guided, seed=seed)
    logps, mask, g, entropy = (q[name] for name in quantities_of(guided))
    mean = torch.where(mask, logps, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    close(guided(logps, mask, torch.ones_like(g)), -mean)
    last = torch.zeros_like(g)
    for row, m in zip(last, mask, strict=True):
        row[m.nonzero()[-1:, 0]] = 2.0
    close(guided(logps, mask, last, to_go=True), -mean)
    close(guided(logps, mask, scale * g), guided(logps, mask, g))
    close(guided(logps, mask, g, to_go=True, entropy_coef=0.0), guided(logps, mask, g, to_go=True))
    both = guided(logps, mask, 0 * g, entropy, entropy_coef=scale)
    close(both, -scale * torch.where(mask, entropy, 0).sum(-1))


def test_guided_mle_without_guidance():
    logps, mask = leaf([-1.0, -2.0]), torch.ones(1, 2).bool()
    for weights in ([0.0, 0.0], [1.0, -1.0]):
        rows = get("preference_guided_mle")(logps, mask, torch.tensor([weights]))
        assert rows.item() == 0
        assert gradient(rows, logps).abs().sum() == 0
    message = r"^entropy: expected a tensor with entropy_coef 0.1, got None$"
    with pytest.raises(ValueError, match=message):
        get("preference_guided_mle")(logps, mask, mask.float(), entropy_coef=0.1)


@given(seed=seeds, beta=st.floats(0.01, 2), delta=st.floats(-1, 1))
@few
def test_family_of_bco(seed, beta, delta):
    q = make_inputs(get("bco"), seed=seed)
    x, labels = q["logratios"], q["labels"]
    a, b = x, x.flip(0)
    pair = get("bco_pair")(a, b, beta=beta, delta=delta)
    good = get("bco")(a, torch.ones(6), beta=beta, delta=delta)
    close(pair, good + get("bco")(b, torch.zeros(6), beta=beta, delta=delta))
    hard = get("bco")(x, labels, beta=beta)
    close(get("pointwise_dpo")(x, labels, beta=beta), hard)
    soft = torch.full_like(x, 0.3)
    mixture = 0.3 * get("dpo")(x, 0 * x, beta=beta) + 0.7 * get("dpo")(0 * x, x, beta=beta)
    close(get("pointwise_dpo")(x, soft, beta=beta), mixture)
    logps = -x.abs()
    close(get("ulma")(logps, x, labels, beta=beta), torch.where(labels, -logps, hard))


@given(seed=seeds)
@few
def test_depo_is_kto_with_a_bonus(seed):
    q = make_inputs(get("depo"), seed=seed)
    x, labels, kl, n, steps = q.values()
    weights = {"desirable_weight": 0.7, "undesirable_weight": 1.3}
    plain = get("kto")(x, labels, kl, **weights)
    close(get("depo")(*q.values(), alpha_token=0.0, alpha_step=0.0, **weights), plain)
    rows = get("depo")(*q.values(), **weights)
    assert torch.equal(rows[~labels], plain[~labels])
    assert (rows <= plain).all()
    longer = get("depo")(x, labels, kl, 2 * n + 2, steps, **weights)
    slower = get("depo")(x, labels, kl, n * (steps + 1), steps + 1, alpha_token=0.0, **weights)
    fewer = get("depo")(*q.values(), alpha_token=0.0, **weights)
    assert (longer >= rows).all()
    assert (slower >= fewer).all()


@given(seed=seeds, alpha=st.floats(0, 1))
@few
def test_pmpo_is_a_difference_of_means(seed, alpha):
    q = make_inputs(get("pmpo"), seed=seed)
    logps, labels, kl = q["logps"], q["labels"], q["forward_kl"]
    none = logps.new_zeros(())
    good = logps[labels].mean() if labels.any() else none
    bad = logps[~labels].mean() if not labels.all() else none
    expected = -alpha * good + (1 - alpha) * bad
    close(get("pmpo")(logps, labels, alpha=alpha, beta=0.0).mean(), expected)
    total = get("pmpo")(logps, labels, kl, alpha=alpha, beta=0.3).mean()
    close(total, expected + 0.3 * kl.mean())


def test_pmpo_without_its_divergence():
    logps, labels = leaf(-1.0, -2.0), torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"^forward_kl: expected a tensor with beta 0.5, got None"):
        get("pmpo")(logps, labels)


@given(seed=seeds, beta=st.floats(0.01, 1))
@few
def test_regressions(seed, beta):
    q = make_inputs(get("a2po"), seed=seed)
    x, s, v = q.values()
    close(get("a2po")((s - v) / beta, s, v, beta=beta), 0 * x)
    close(get("a2po")(x, s, 0 * v, beta=beta), beta**2 * get("gpo")(x, s, beta=beta), rtol=1e-7)
    a, b, s_w, s_l = x, x.flip(0), s, v
    halves = get("gpo")(a, s_w - 0.5, beta=beta) + get("gpo")(b, s_l - 0.5, beta=beta)
    close(get("sppo")(a, b, s_w, s_l, beta=beta), halves / 2)


@pytest.mark.parametrize("key", ["kto", "depo", "bco", "pointwise_dpo", "kto_apo_zero"])
def test_beta_to_zero(key):
    q = make_inputs(get(key))
    free = {"alpha_token": 0.0, "alpha_step": 0.0} if key == "depo" else {}
    limit = math.log(2) if key in ("bco", "pointwise_dpo") else 0.5
    close(get(key)(**q, beta=1e-14, **free), torch.full_like(q["logratios"], limit))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("key", ["kto", "pointwise_dpo", "dpo_plackett_luce", "restricted_ce"])
def test_checks_of_values_leave_vmap_alone(key):
    """They would read a value of many."""
    q = make_inputs(get(key)) | {"groups": torch.tensor([0, 0, 1, 1, 2, 2])}
    q = {n: x.int() if n == "labels" else x for n, x in q.items() if n in quantities_of(get(key))}
    moved = {name: None if name == "groups" else 0 for name in q}
    twice = {n: x if moved[n] is None else torch.stack([x, x]) for n, x in q.items()}
    fixed = {"num_groups": 3} if "groups" in q else {}
    rows = torch.vmap(lambda given: get(key)(**given, **fixed), (moved,))(twice)
    close(rows, get(key)(**q).expand_as(rows))

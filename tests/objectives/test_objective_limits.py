"""Limits and identities between objectives, and what they do where a naive formula breaks."""

import math

import pytest
import torch
from _objective_truth import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import _math, get

few = settings(max_examples=15, deadline=None)
numbers = st.floats(-30, 30, allow_nan=False)
columns = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64).unbind(-1)
)
DIFFERENCE_ONLY = ("dpo", "robust_dpo", "hinge", "ipo", "exo_pair", "discopop", "aot_unpaired")


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def lengths(*values: int):
    return torch.tensor(values)


@pytest.mark.parametrize("key", DIFFERENCE_ONLY)
@given(sides=columns, shift=numbers)
@few
def test_a_common_shift_of_both_sides_changes_nothing(key, sides, shift):
    a, b = sides
    close(get(key)(a + shift, b + shift), get(key)(a, b), rtol=1e-6, atol=1e-9)


@given(sides=columns, e=st.floats(0, 1))
@few
def test_labels_of_dpo(sides, e):
    dpo, (a, b) = get("dpo"), sides
    label = torch.full_like(a, 1 - e)
    close(dpo(a, b, soft_labels=label), dpo(a, b, label_smoothing=e))
    close(dpo(a, b, soft_labels=torch.ones_like(a)), dpo(a, b))
    close(dpo(a, b, soft_labels=torch.zeros_like(a)), dpo(b, a))


@given(sides=columns)
@few
def test_family_of_dpo(sides):
    a, b = sides
    one = torch.ones(len(a), dtype=torch.int64)
    dpo, hard = get("dpo"), get("dpo")(a, b, beta=0.7)
    close(get("robust_dpo")(a, b, beta=0.7, label_smoothing=0.0), hard)
    close(get("dpo_norm")(a, b, one, one, beta=0.7), hard)
    close(get("dpo_norm")(a, b, 0 * one, 0 * one, beta=0.7), hard)
    close(get("simpo")(a, b, one, one, beta=0.7, gamma=0.0), hard)
    close(get("cpo")(a, b, one, beta=0.7, cpo_alpha=0.0), hard)
    close(get("ipo_norm")(a, b, one, one), get("ipo")(a, b))
    close(get("bco_pair")(a, b) - get("bco_pair")(0 * a, b), dpo(a, 0 * a) - math.log(2))
    rows = torch.cat(
        [get("aot")(x, y, 0 * x, 0 * y) for x, y in zip(a.split(1), b.split(1), strict=True)]
    )
    close(rows, dpo(a, b))
    rows = torch.cat(
        [get("aot_unpaired")(x, y) for x, y in zip(a.split(1), b.split(1), strict=True)]
    )
    close(rows, dpo(a, b))


@given(sides=columns)
@few
def test_beta_to_zero(sides):
    a, b = sides
    half = torch.full_like(a, math.log(2))
    for key, limit in (("dpo", 1), ("nca_pair", 2), ("bco_pair", 2), ("aot_unpaired", 1)):
        close(get(key)(a, b, beta=1e-12), limit * half)
    for key in ("apo_zero", "apo_down", "hinge"):
        close(get(key)(a, b, beta=1e-12), torch.ones_like(a))


def test_exo_is_a_divergence():
    e = 0.2
    z = torch.linspace(-6, 6, 41, dtype=torch.float64)
    rows = get("exo_pair")(z, 0 * z, beta=1.0, label_smoothing=e)
    assert (rows >= 0).all()
    best = torch.tensor([math.log((1 - e) / e)], dtype=torch.float64)
    close(get("exo_pair")(best, 0 * best, beta=1.0, label_smoothing=e), 0 * best)


def test_f_divergence_limits():
    a, b = torch.randn(2, 5, dtype=torch.float64)
    score = get("f_divergence")
    plain = score(a, b)
    for alpha in (0.0, 1e-7, -1e-7, 2e-6):
        near = score(a, b, divergence="alpha", alpha=alpha)
        close(near["chosen_logratios"], plain["chosen_logratios"], rtol=1e-4, atol=1e-5)
    forward, one = score(a, b, divergence="forward_kl"), score(a, b, divergence="alpha", alpha=1.0)
    close(one["rejected_logratios"], forward["rejected_logratios"])


def test_kto_baseline():
    kto, apo = get("kto"), get("kto_apo_zero")
    x, labels = torch.randn(6), torch.arange(6) % 2 == 0
    none, below, above = torch.empty(0), torch.tensor([-3.0, 1.0]), torch.tensor([2.0])
    assert torch.equal(kto(x, labels, none), apo(x, labels))
    assert torch.equal(kto(x, labels, below), apo(x, labels))
    close(kto(x, labels, above), apo(x - 2.0, labels), rtol=1e-6, atol=1e-7)
    assert torch.equal(kto(x, labels.long(), above), kto(x, labels, above))


@given(seed=st.integers(0, 50), shift=numbers, scale=st.floats(0.1, 10))
@few
def test_advantages(seed, shift, scale):
    inputs = make_inputs(get("group_advantages"), seed=seed)
    s, groups = inputs["scores"], inputs["groups"]

    def group(scores, **options):
        return get("group_advantages")(scores, groups, **options)["advantages"]

    for kind in ("group", "batch", "none"):
        close(group(s + shift, scale=kind), group(s, scale=kind), atol=1e-8)
    close(group(scale * s, eps=0.0), group(s, eps=0.0), atol=1e-8)
    equal = torch.full_like(s, 0.1 + shift).float()
    assert group(equal, eps=0.0).abs().sum() == 0
    sums = torch.zeros(3, dtype=s.dtype).index_add(0, groups, group(s))
    close(sums, torch.zeros(3, dtype=s.dtype))
    rloo = get("rloo_advantages")(s, groups)["advantages"]
    close(torch.zeros(3, dtype=s.dtype).index_add(0, groups, rloo), 0 * sums)


@given(seed=st.integers(0, 50), lost=st.sets(st.integers(0, 5), min_size=1))
@few
def test_a_row_without_a_reward_is_not_there(seed, lost):
    """NaN, as where every reward function returned None: advantage 0, and no part of a mean."""
    inputs = make_inputs(get("group_advantages"), seed=seed)
    scores, groups = inputs["scores"], inputs["groups"]
    known = torch.tensor([i not in lost for i in range(len(scores))])
    with_gaps = scores.masked_fill(~known, math.nan)
    for function in (
        get("rloo_advantages", num_groups=3),
        *(get("group_advantages", scale=s, num_groups=3) for s in ("group", "batch", "none")),
    ):
        found = function(with_gaps, groups)["advantages"]
        assert (found[~known] == 0).all()
        close(found[known], function(scores[known], groups[known])["advantages"])


def test_the_sampler_may_not_know_a_token():
    """NaN, as engines mark it, has ratio 1. A NaN of one's own model stays one."""
    old, mask = -torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    sampler = -torch.rand(2, 4)
    unknown = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    with_gaps, filled = sampler.masked_fill(unknown, math.nan), torch.where(unknown, old, sampler)
    broken = old.masked_fill(torch.eye(2, 4).bool(), math.nan)
    for mode in ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"):
        weights = get("sampler_is_weights", mode=mode, cap=None)
        found = weights(old, with_gaps, mask)["is_weights"]
        assert torch.equal(found, weights(old, filled, mask)["is_weights"])
        assert torch.equal(found[1], torch.ones_like(found[1]))
        assert weights(broken, sampler, mask)["is_weights"].isnan()[0, 0]


def test_an_entropy_that_is_nan_is_not_low():
    """As -(p·log p) is beside words that a sampler left out: every token fell out of the loss."""
    entropy, mask = torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    weights = get("high_entropy_mask")(entropy.fill_(math.nan), mask)["is_weights"]
    assert torch.equal(weights.isnan(), mask)
    entropy[0, 1:] = torch.tensor([0.3, 2.0, 0.1])
    weights = get("high_entropy_mask", top=0.6)(entropy, mask)["is_weights"]
    assert torch.equal(weights.isnan(), mask & entropy.isnan())


def test_batch_reduction_averages_to_the_token_mean():
    logps, n = torch.tensor([-3.0, 0.0, -8.0]), lengths(2, 0, 4)
    close(get("sft")(logps, n).mean(), torch.tensor(11 / 6), rtol=1e-6)
    close(get("nll")(logps, n).mean(), torch.tensor(11 / 6), rtol=1e-6)
    assert get("sft")(0 * logps, 0 * n).abs().sum() == 0


def finite(key: str, *sides: float, lengths: tuple[int, ...] = (), **hyper) -> bool:
    leaves = [torch.tensor([x], requires_grad=True) for x in sides]
    rows = get(key)(*leaves, *(torch.tensor([n]) for n in lengths), **hyper)
    rows.sum().backward()
    return bool(rows.isfinite().all()) and all(bool(x.grad.isfinite().all()) for x in leaves)


@pytest.mark.parametrize("c", [0.0, -1e-12, -1e-6, -500.0])
@pytest.mark.parametrize("r", [0.0, -1e-12, -1e-6, -500.0])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_certainty_and_emptiness(c, r, n):
    assert finite("orpo", c, r, lengths=(n, 1))
    assert finite("simpo", c, r, lengths=(n, 0))
    assert finite("sft", c, lengths=(n,))
    assert finite("cpo", c, r, lengths=(n,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conventions(dtype):
    x = torch.tensor([-500, -40, -1, -0.7, -0.69, -1e-3, -1e-6], dtype=dtype, requires_grad=True)
    exact = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
    truth = torch.tensor(exact, dtype=torch.float64)
    value = _math.log1mexp(x)
    close(value, truth.to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=0.0)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.isfinite().all()
    big = torch.tensor([500.0], dtype=dtype, requires_grad=True)
    for function in (_math.exp_cap, _math.expm1_cap, _math.k3):
        assert (function(big) * function(big)).isfinite().all()
        assert torch.autograd.grad(function(big).sum(), big)[0] == 0
    assert (_math.k3(torch.linspace(-50, 50, 101, dtype=dtype)) >= 0).all()
    # F.softplus is linear from 20 on: wrong by 2e-9 there, which float64 sees
    assert _math.softplus(torch.tensor(25.0, dtype=torch.float64)).item() - 25.0 > 1e-11
    with pytest.raises(
        ValueError, match=r"^reduction: expected one of mean, sum, batch, got 'max'"
    ):
        _math.nll_term(x, x, "max")


def test_groups():
    groups, x = lengths(0, 0, 2, 2, 2), torch.arange(5.0, requires_grad=True)
    assert _math.group_count(groups, None) == (3, None)
    assert _math.group_count(groups[:0], None)[0] == 0
    assert _math.group_sizes(groups, 5).tolist() == [2, 0, 3, 0, 0]
    total = _math.group_sum(x, groups, 5)
    assert total.tolist() == [1, 0, 9, 0, 0]
    (gradient,) = torch.autograd.grad((total * torch.arange(5.0)).sum(), x)
    assert gradient.tolist() == [0, 0, 2, 2, 2]

"""compose: what it asks for, in which order it runs, what it refuses."""

import copy
import inspect
import math
import pickle
import re
from functools import partial

import pytest
import torch
from _objective_truth import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo import objectives, quantities
from fastpo.objectives import compose, get
from fastpo.objectives._registry import of_table

TOKENS = ["chosen_token_logps", "rejected_token_logps", "chosen_mask", "rejected_mask"]
REFERENCE = ["ref_chosen_token_logps", "ref_rejected_token_logps"]


def names(function) -> dict[str, bool]:
    """Quantity -> required."""
    return {
        n: p.default is p.empty
        for n, p in inspect.signature(function).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    }


def required(function) -> list[str]:
    return [n for n, needed in names(function).items() if needed]


def test_union_of_quantities():
    sides = ["chosen_logratios", "rejected_logratios"]
    sizes = ["chosen_lengths", "rejected_lengths"]
    plain = compose("dpo")
    assert names(plain) == {**dict.fromkeys(sides, True)} | dict.fromkeys(
        ["soft_labels", "margins", "pair_weights"], False
    )
    assert inspect.signature(plain).parameters["beta"].default == 0.1
    assert required(compose("dpo", "length_normalize")) == sides + sizes
    assert required(compose("dpo", reference_free=True)) == ["chosen_logps", "rejected_logps"]
    labelled = compose("dpo", "score_labels")
    assert required(labelled) == ["chosen_scores", "rejected_scores", *sides]
    assert "soft_labels" not in names(labelled)
    more = compose("ipo", sft_weight=0.1, third_weight=0.2)
    assert required(more) == [*sides, "chosen_logps", "chosen_lengths", "third_logps"]


def test_what_a_partial_binds_by_position():
    def mine(scale, chosen_logratios, rejected_logratios):
        return scale * (chosen_logratios - rejected_logratios)

    once = partial(mine, 0.5)
    assert required(compose(once)) == ["chosen_logratios", "rejected_logratios"]
    assert compose(once)(torch.ones(2), torch.zeros(2)).tolist() == [0.5, 0.5]
    twice = partial(Again(mine, 0.5), torch.ones(2))
    assert compose(twice)(torch.zeros(2)).tolist() == [0.5, 0.5]


class Again(partial):
    """functools flattens partials of partials, but not of its subclasses."""


def test_ld_logps_takes_the_reference_along():
    """Log-ratios are derived after the truncation of both."""
    function = compose("dpo", get("ld_logps", ld_alpha=0.3))
    assert required(function) == TOKENS + REFERENCE
    assert required(compose("dpo", "ld_logps", reference_free=True)) == TOKENS
    assert required(compose("aot", "ld_logps")) == TOKENS + REFERENCE
    assert required(compose("simpo", "ld_logps")) == [*TOKENS, "chosen_lengths", "rejected_lengths"]
    inputs = make_inputs(get("ld_logps"))
    reference = {f"ref_{n}": 0.7 * inputs[n] for n in TOKENS[:2]}
    policy = get("ld_logps")(**inputs, ld_alpha=0.3)
    ratios = [0.3 * policy[f"{side}_logps"] for side in ("chosen", "rejected")]
    torch.testing.assert_close(function(**inputs, **reference), get("dpo")(*ratios))
    # A second time, after a transform that asked for what the first one left of the reference.
    stages = get("ld_logps", ld_alpha=0.9), "f_divergence", get("ld_logps", ld_alpha=0.3)
    again = compose("dpo", *stages)(**inputs, **reference)
    torch.testing.assert_close(again, get("dpo")(*ratios))


def test_the_reference_of_a_transform_is_constant():
    function = compose("dpo", "ld_logps")
    inputs = make_inputs(get("ld_logps"))
    reference = {n: torch.rand(6, 5).requires_grad_() for n in REFERENCE}
    leaf = inputs["chosen_token_logps"].requires_grad_()
    function(**inputs, **reference).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert all(x.grad is None for x in reference.values())


@given(seed=st.integers(0, 30))
@settings(max_examples=10, deadline=None)
def test_thin_entries(seed):
    g = torch.Generator().manual_seed(seed)
    a, b, third = torch.randn(3, 4, generator=g)
    n_c, n_r = torch.randint(0, 5, (2, 4), generator=g)
    sides = {"chosen_logratios": a, "rejected_logratios": b}
    logps = {"chosen_logps": a, "rejected_logps": b}
    sizes = {"chosen_lengths": n_c, "rejected_lengths": n_r}
    close = torch.testing.assert_close
    normal = compose(get("ipo", beta=0.3), "length_normalize")
    close(normal(**sides, **sizes), get("ipo_norm")(**sides, **sizes, beta=0.3))
    normal = compose("dpo", "length_normalize")
    close(normal(**sides, **sizes, beta=0.3), get("dpo_norm")(**sides, **sizes, beta=0.3))
    cpo = compose("dpo", reference_free=True, sft_weight=0.5, sft_reduction="batch")
    expected = get("cpo")(**logps, chosen_lengths=n_c, cpo_alpha=0.5, sft_reduction="batch")
    close(cpo(**logps, chosen_lengths=n_c), expected)
    gold = compose("orpo", third_weight=0.2)(**logps, **sizes, third_logps=third)
    close(gold, get("orpo")(**logps, **sizes) - 0.2 * third)


def test_weights_reach_every_objective():
    """dpo applies pair_weights itself; around an objective that does not, compose multiplies."""
    inputs = make_inputs(get("wpo_weights"))
    weights = get("wpo_weights")(**inputs)["pair_weights"]
    a, b = torch.randn(2, 6, dtype=torch.float64)
    for key in ("dpo", "hinge"):
        rows = compose(key, "wpo_weights")(**inputs, chosen_logratios=a, rejected_logratios=b)
        torch.testing.assert_close(rows, weights * get(key)(a, b))


def test_two_transforms_that_give_weights_multiply():
    @objectives.transform("weights_of_a_test", outputs=("pair_weights",))
    def scores(chosen_scores: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pair_weights": chosen_scores}

    @objectives.transform("other_weights_of_a_test", outputs=("pair_weights",))
    def others(chosen_scores: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pair_weights": chosen_scores}

    a, b, w = torch.randn(3, 6)
    inputs = {"chosen_logratios": a, "rejected_logratios": b, "chosen_scores": w}
    try:
        for two in ((scores, scores), (scores, others)):
            rows = compose("dpo", *two)(**inputs)
            torch.testing.assert_close(rows, w * w * get("dpo")(a, b))
            rows = compose("hinge", *two)(**inputs)
            torch.testing.assert_close(rows, w * w * get("hinge")(a, b))
    finally:
        for key in ("weights_of_a_test", "other_weights_of_a_test"):
            objectives._registry._TABLE.pop(key)


def rollout(**more):
    """Two tokens of a policy that is e times the sampler."""
    x = torch.tensor([[-1.0, -2.0]])
    given = {"token_logps": x, "old_token_logps": x, "sampler_token_logps": x - 1}
    given |= {"mask": torch.ones(1, 2), "advantages": torch.ones(1), "entropy": -x}
    return quantities.Quantities({**given, **more})


def test_weights_of_the_batch_and_of_a_transform_multiply():
    """A sampler's weights, beside a mask by entropy: neither is dropped."""
    masked = compose("reinforce", get("high_entropy_mask", top=0.0))
    for weights in (torch.tensor([[0.5]]), torch.tensor([[7.0, 0.5]])):
        assert rollout(is_weights=weights).rows(masked).tolist() == [1.0]
    assert rollout().rows(masked).tolist() == [2.0]
    for size in (1, 2):
        message = rf"^is_weights: expected shape \(1, 2\), got \({size},\)"
        with pytest.raises(ValueError, match=message):
            rollout(is_weights=torch.ones(size)).rows(masked)


def test_masks_of_two_transforms_multiply():
    ratios = get("sampler_is_weights", mode="token_truncate")
    both = compose("reinforce", ratios, get("high_entropy_mask", top=0.0))
    assert rollout().rows(both).item() == pytest.approx(2 * math.e)


@pytest.mark.parametrize(
    "key", ["wpo_weights", "off_policy_mask", "high_entropy_mask", "sampler_is_weights"]
)
def test_weights_are_constants(key):
    inputs = make_inputs(get(key))
    inputs = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    assert not any(x.requires_grad for x in get(key)(**inputs).values())


def test_bounds_of_weights_are_inside():
    """A weight that is the bound, a drift that is the threshold, an advantage of 0."""
    x, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
    assert get("sampler_is_weights", cap=1.0, floor=1.0)(x, x, mask)["is_weights"] == 1
    for drift, advantage in ((0.5, -1.0), (0.6, 0.0)):
        kept = get("off_policy_mask", threshold=0.5)(x, x + drift, mask, torch.tensor([advantage]))
        assert kept["is_weights"] == 1


def test_what_one_transform_needs_is_needed():
    """Also where others could do without."""
    assert names(get("grpo"))["old_token_logps"] is False
    assert "old_token_logps" in required(compose("grpo", "sampler_is_weights"))


def test_a_transform_of_ones_own_may_make_anything():
    def ratios(chosen_logps, rejected_logps):
        return {"chosen_logratios": chosen_logps, "rejected_logratios": rejected_logps}

    function = compose("dpo", ratios)
    assert required(function) == ["chosen_logps", "rejected_logps"] and not of_table(function)
    a, b = torch.randn(2, 3)
    torch.testing.assert_close(function(chosen_logps=a, rejected_logps=b), get("dpo")(a, b))


def test_a_bound_quantity_is_asked_of_nobody():
    a, b, t = torch.rand(3, 4)
    function = compose(partial(get("dpo"), soft_labels=t))
    assert "soft_labels" not in inspect.signature(function).parameters
    torch.testing.assert_close(function(a, b), get("dpo")(a, b, soft_labels=t))


def test_a_divergence_may_stand_in_front_of_what_reads_no_ratios():
    logps = {"chosen_logps": -torch.rand(3), "chosen_lengths": torch.tensor([1, 2, 3])}
    function = compose("sft", get("f_divergence", divergence="js"))
    more = {name: torch.zeros(3) for name in required(function) if name not in logps}
    given = {name: logps[name] for name in names(get("sft")) if name in logps}
    torch.testing.assert_close(function(**given, **more), get("sft")(**given))


def test_weights_that_a_transform_reads_are_replaced():
    def bounded(is_weights):
        return {"is_weights": is_weights.clamp(max=2.0)}

    ratios = get("sampler_is_weights", mode="token_truncate", cap=None)
    assert rollout().rows(compose("reinforce", ratios, bounded)).tolist() == [6.0]
    given = rollout(is_weights=torch.full((1, 2), 5.0))
    assert given.rows(compose("reinforce", bounded)).tolist() == [6.0]


def test_transforms_run_from_left_to_right():
    def halve(chosen_logratios, rejected_logratios):
        return {"chosen_logratios": chosen_logratios / 2, "rejected_logratios": rejected_logratios}

    score = partial(get("f_divergence"), divergence="js")
    a, b = torch.randn(2, 3)
    s = get("f_divergence", divergence="js")
    first = s(a / 2, b)
    torch.testing.assert_close(compose("ipo", halve, score)(a, b), get("ipo")(*first.values()))
    after = s(a, b)
    expected = get("ipo")(after["chosen_logratios"] / 2, after["rejected_logratios"])
    torch.testing.assert_close(compose("ipo", score, halve)(a, b), expected)


def test_half_precision_and_optional_quantities():
    a, b = torch.randn(2, 4).bfloat16()
    function = compose("dpo", third_weight=1.0)
    rows = function(a, b, third_logps=a, soft_labels=None)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, get("dpo")(a, b) - a.float())


def test_in_front_of_diffusion():
    errors = make_inputs(get("denoising_logratios"))
    function = compose("dpo", get("denoising_logratios", scale=3.0))
    assert "timestep_weights" in names(function)
    assert "timestep_weights" not in required(function)
    ratios = get("denoising_logratios")(**errors, scale=3.0)
    torch.testing.assert_close(function(**errors), get("dpo")(*ratios.values()))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("apo_zero", "f_divergence"), {}, "^f_divergence: expected an objective among .*apo_zero"),
        (("aot", "wpo_weights"), {}, "^aot: expected no pair_weights, .* got wpo_weights"),
        (("hinge", "score_labels"), {}, "^hinge: expected transforms .* used, got score_labels"),
        (
            ("dpo", "length_normalize", "ld_logps"),
            {},
            "^dpo: expected transforms .* used, got length_normalize",
        ),
        (("dpo", "hinge"), {}, "^compose: expected a transform, got the objective hinge"),
        (
            ("score_labels",),
            {},
            "^objective: expected an objective, got the transform score_labels",
        ),
        (("dpo",), {"sft_weight": -1.0}, r"^sft_weight: expected a number in \[0, inf\), got -1.0"),
        (("dpo",), {"sft_reduction": "max"}, "^sft_reduction: expected one of mean, sum, batch"),
        (("nothing",), {}, "^objective: expected one of"),
        (("dpo", "length_normalise"), {}, "^transform: expected one of .* it: length_normalize"),
        ((3,), {}, "^objective: expected a key or a function, got 3"),
        (("dpo", 3), {}, "^transform: expected a key or a function, got 3"),
        (
            ("infonca",),
            {"sft_weight": 1.0},
            "^infonca: expected no sft_weight, rows are groups; got 1.0",
        ),
        (
            ("rm_listmle",),
            {"third_weight": 0.5},
            "^rm_listmle: expected no third_weight, rows are groups; got 0.5",
        ),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        compose(*arguments, **options)


SIDES = {n: torch.zeros(3) for n in ("chosen_logratios", "rejected_logratios")}
TERMS = {n: torch.ones(3) for n in ("chosen_logps", "chosen_lengths", "third_logps")}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
def test_terms_have_the_shape_of_the_rows(name, shape):
    """Broadcast, they would change the number of rows, or one term would count three times."""
    function = compose("dpo", sft_weight=1.0, third_weight=1.0)
    assert function(**SIDES, **TERMS).shape == (3,)
    message = rf"^{name}: expected shape \(3,\), got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        function(**SIDES, **{**TERMS, name: torch.ones(shape)})


def test_what_compose_reads_is_checked():
    with pytest.raises(ValueError, match=r"^chosen_logratios: expected a tensor, got list"):
        compose("dpo")(**{**SIDES, "chosen_logratios": [0.0, 1.0, 2.0]})
    tokens = {n: x[:1] for n, x in make_inputs(get("wpo_weights")).items()}
    with pytest.raises(ValueError, match=r"^pair_weights: expected shape \(3,\), got \(1,\)"):
        compose("hinge", "wpo_weights")(**SIDES, **tokens)


def test_a_reference_is_not_broadcast():
    @objectives.transform("halves_of_a_test", outputs=("chosen_logps",))
    def halve(chosen_logps: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"chosen_logps": chosen_logps / 2}

    try:
        function = compose("dpo", halve)
        given = {n: torch.zeros(3) for n in required(function)}
        assert function(**given).shape == (3,)
        with pytest.raises(ValueError, match=r"^ref_chosen_logps: expected shape \(3,\), got"):
            function(**{**given, "ref_chosen_logps": torch.zeros(1)})
    finally:
        objectives._registry._TABLE.pop("halves_of_a_test")
    q = quantities.padded(torch.zeros(6, 2), torch.ones(6, 2))
    for column in (torch.zeros(1), torch.zeros(3, 1)):
        sums = {"ref_chosen_logps": column, "ref_rejected_logps": torch.zeros(3)}
        with pytest.raises(ValueError, match=r"^ref_chosen_logps: expected shape \(3,\), got"):
            (q | sums).rows(get("dpo"))
    tokens = {"ref_chosen_token_logps": torch.zeros(3, 1)}
    with pytest.raises(ValueError, match=r"^ref_chosen_token_logps: expected shape \(3, 2\), got"):
        (q | tokens)["ref_chosen_logps"]


def test_the_pairs_of_annotators_take_terms():
    """maxmin_rm has groups, and a row for each pair."""
    rewards = {n: torch.zeros(3, 2) for n in ("chosen_rewards", "rejected_rewards")}
    function = compose("maxmin_rm", third_weight=1.0)
    rows = function(**rewards, groups=torch.tensor([0, 0, 1]), third_logps=TERMS["third_logps"])
    assert rows.shape == (3,)


def test_missing_quantity():
    with pytest.raises(TypeError, match="rejected_logratios"):
        compose("dpo")(torch.zeros(2))


def test_weights_of_the_batch_are_refused_through_compose():
    a = torch.zeros(2)
    columns = {"chosen_logratios": a, "rejected_logratios": a, "pair_weights": a}
    for function in (get("aot_unpaired"), compose("aot_unpaired")):
        with pytest.raises(ValueError, match=r"^pair_weights: expected none"):
            quantities.Quantities(columns).rows(function)


def test_added_terms_are_of_the_batch_whatever_transforms_make():
    """The NLL of what `ld_logps` leaves of a completion would be divided by the whole length."""
    g = torch.Generator().manual_seed(0)
    tokens = {name: -torch.rand(2, 4, generator=g) for name in TOKENS[:2]}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    inputs = {**tokens, **{f"ref_{name}": x / 2 for name, x in tokens.items()}}
    inputs |= {"chosen_mask": mask, "rejected_mask": mask & mask[1]}
    cut = partial(objectives.transforms.ld_logps, ld_alpha=0.0)
    logps, lengths = (tokens["chosen_token_logps"] * mask).sum(1), mask.sum(1)
    more = compose("dpo", cut, sft_weight=0.5)
    rows = more(**inputs, chosen_logps=logps, chosen_lengths=lengths)
    torch.testing.assert_close(rows - compose("dpo", cut)(**inputs), -0.5 * logps / lengths)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("options", [{}, {"reference_free": True, "sft_weight": 0.5}])
def test_a_pickle_composes_again(again, options):
    """As of a trainer's arguments, and for processes that are not forks."""
    g = torch.Generator().manual_seed(0)
    function = compose(compose(get("dpo", beta=0.3), "length_normalize"), "score_labels", **options)
    other = again(function)
    given = {name: torch.rand(3, generator=g) for name in names(function)}
    assert torch.equal(other(**given), function(**given))
    assert inspect.signature(other) == inspect.signature(function)
    assert (other.__name__, other.__doc__) == (function.__name__, function.__doc__)

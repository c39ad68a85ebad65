"""Limits and identities of the policy gradients: each entry where it is another one."""

import math

import pytest
import torch
from _objective_truth import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import available, get
from fastpo.objectives._registry import lookup, quantities_of

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**20)
N, T = 5, 6
LEVELS = ("token", "sequence", "sequence_token")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo")
WEIGHTED = (*CLIPPED, "cispo", "sapo", "vespo")
PER_TOKEN = (*WEIGHTED, "reinforce")  # take advantages [N, T] and is_weights
PENALISED = (*WEIGHTED, "gmpo")
KEYS = available("policy_gradient")
FORMS = {"values": 1, "advantages": 1}


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def inputs(key: str, seed: int, *, optional: bool = True, **options):
    """Quantities of an entry in the shape it takes; the first row is empty."""
    shapes = lookup(key).shapes
    forms = {n: 1 for n in FORMS if shapes[n] == (("N", "T"),)}
    q = make_inputs(get(key), seed=seed, forms=forms, **{"N": N, "T": T, **options})
    needed = quantities_of(get(key))
    return {name: x for name, x in q.items() if optional or needed[name]}


def evaluate(key: str, q, **hyper):
    """Rows, and the gradient of their sum in the log-probabilities."""
    leaf = q["token_logps"].clone().requires_grad_()
    rows = get(key, **hyper)(**{**q, "token_logps": leaf})
    return rows.detach(), torch.autograd.grad(rows.sum(), leaf)[0]


def agree(one, other):
    for a, b in zip(one, other, strict=True):
        close(a, b)


@pytest.mark.parametrize("key", PER_TOKEN)
@given(seed=seeds)
@few
def test_a_value_per_row_is_the_same_value_per_token(key, seed):
    q = inputs(key, seed)
    spread = {**q, "advantages": q["advantages"][:, None].expand(N, T)}
    agree(evaluate(key, q), evaluate(key, spread))
    q["is_weights"] = q["is_weights"][:, :1]
    weights = q["is_weights"].expand(N, T)
    if key == "vespo":  # there the log of one value counts once, on whichever scored token
        first = q["mask"] & (q["mask"].cumsum(-1) == 1)
        weights = torch.where(first, weights, 1)
    agree(evaluate(key, q), evaluate(key, {**q, "is_weights": weights}))


@pytest.mark.parametrize("key", ["bnpo", "dapo", "cispo", "vespo"])
@given(seed=seeds)
@few
def test_rows_of_a_token_mean(key, seed):
    """The mean of the rows is one mean over the tokens of the batch, however they are cut."""
    q = inputs(key, seed)
    tokens = int(q["mask"].sum())
    rows = get(key)(**q)
    close(get(key, **({} if key == "bnpo" else {"num_tokens": tokens}))(**q), rows)
    if key != "bnpo":
        parts = [
            get(key, num_tokens=torch.tensor(tokens))(**{n: x[part] for n, x in q.items()}).sum()
            / (part.stop - part.start)
            for part in (slice(0, 2), slice(2, N))
        ]
        close(sum(parts), rows.mean())


@given(seed=seeds)
@few
def test_thin_entries(seed):
    q = inputs("grpo", seed)
    q["mask"][0] = True
    agree(evaluate("bnpo", q), evaluate("dapo", q, epsilon_high=None))
    options = {"epsilon_low": 0.0003, "epsilon_high": 0.0004}
    agree(evaluate("gspo", q), evaluate("grpo", q, level="sequence", **options))
    total = [x / 9 for x in evaluate("luspo", q, level="token")]
    agree(evaluate("dr_grpo", q, max_length=9), total)
    agree(evaluate("dr_grpo", q), evaluate("dr_grpo", q, max_length=T))
    full = {**q, "mask": torch.ones(N, T, dtype=torch.bool)}
    for key in ("bnpo", "dr_grpo"):
        agree(evaluate(key, full), evaluate("grpo", full))
    agree(evaluate("ppo", q), evaluate("bnpo", q))


@given(seed=seeds)
@few
def test_gspo_token_is_gspo(seed):
    """With one advantage per row, and one weight, they differ in nothing."""
    q = inputs("gspo", seed)
    q["is_weights"] = q["is_weights"][:, :1]
    options = {"epsilon_low": 0.4, "epsilon_high": 0.6}
    agree(evaluate("gspo", q, **options, level="sequence_token"), evaluate("gspo", q, **options))


@given(seed=seeds)
@few
def test_on_policy_they_are_reinforce(seed):
    """At ratio 1 every surrogate has the score function's gradient."""
    q = inputs("grpo", seed, optional=False)
    for key, reduction in {
        "grpo": "mean", "sapo": "mean", "gspo": "mean", "gmpo": "mean", "luspo": "sum",
        "rloo": "sum", "bnpo": "batch", "dapo": "batch", "cispo": "batch", "vespo": "batch",
    }.items():  # fmt: skip
        level = {"level": "token"} if key == "luspo" else {}
        rows, gradient = evaluate(key, q, **level)
        close(gradient, evaluate("reinforce", q, reduction=reduction)[1])
        old = {**q, "old_token_logps": q["token_logps"]}
        agree(evaluate(key, old, **level), (rows, gradient))


@pytest.mark.parametrize("key", PENALISED)
@given(seed=seeds)
@few
def test_penalties_are_added(key, seed):
    """The KL term is beta times a term that is 0 at the reference; the entropy bonus a mean."""
    q = inputs(key, seed)
    free = get(key)(**q)
    at_reference = {**q, "ref_token_logps": q["token_logps"]}
    close(get(key, beta=0.7)(**at_reference), free)
    kl = get(key, beta=1.0)(**q) - free
    assert (kl >= -1e-12).all()
    close(get(key, beta=0.3)(**q), free + 0.3 * kl, atol=1e-8)
    bonus = free - get(key, entropy_coef=0.5)(**q)
    close(bonus.mean(), 0.5 * q["entropy"][q["mask"]].mean())


@pytest.mark.parametrize("key", CLIPPED)
def test_clipping(key):
    """Beyond the clip there is no gradient on the advantage's side; delta closes the other."""
    q = inputs(key, 1)
    q = {**q, "mask": torch.ones(N, T, dtype=torch.bool), "is_weights": None}
    for side, advantage in ((1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0)):
        q["old_token_logps"] = q["token_logps"] - side
        q["advantages"] = torch.full((N,), advantage, dtype=torch.float64)
        gradient = evaluate(key, q)[1]
        assert (gradient == 0).all() if side == advantage else (gradient != 0).all()
    q["old_token_logps"] = q["token_logps"] - 1.0
    q["advantages"] = -q["advantages"]
    assert (evaluate(key, q, delta=2.0)[1] == 0).all()
    assert (evaluate(key, q, delta=3.0)[1] != 0).all()


@pytest.mark.parametrize("key", KEYS)
def test_nothing_scored(key):
    """0 without gradient; where the row has one ratio it is 1, and the row -A."""
    q = inputs(key, 2, optional=False)
    q["mask"][:] = False
    leaves = {n: q[n].clone().requires_grad_() for n in ("token_logps", "values") if n in q}
    rows = get(key)(**{**q, **leaves})
    expected = -q["advantages"] if key in ("gmpo", "rloo") else torch.zeros(N).double()
    assert torch.equal(rows.detach(), expected)
    for gradient in torch.autograd.grad(rows.sum(), list(leaves.values()), allow_unused=True):
        assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("key", KEYS)
def test_no_positions(key):
    q = inputs(key, 3, T=0)
    assert get(key)(**q).isfinite().all()


@pytest.mark.parametrize("key", [key for key in WEIGHTED if key != "vespo"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_extremes_with_everything_on(key, level, seed):
    q = inputs(key, seed, extreme=True)
    q = {n: x.float() if x.is_floating_point() else x for n, x in q.items()}
    options = {"level": level, "beta": 0.3, "unbiased_kl": True, "entropy_coef": 0.1}
    for rows in evaluate(key, q, **options):
        assert rows.isfinite().all()


def test_vespo_weight():
    """φ is 1 on-policy, vanishes far above the sampler, and survives weights of 0 or below it."""
    q = inputs("vespo", 4, optional=False)
    q["mask"][0] = True
    on_policy = get("vespo")(**q)
    far = {**q, "old_token_logps": q["token_logps"] - 50}
    close(get("vespo")(**far), torch.zeros(N).double())
    close(get("vespo")(**q, is_weights=torch.ones(N, 1)), on_policy)
    tiny = get("vespo")(**q, is_weights=torch.full((N, 1), 1e-8))
    for value in (-1.0, 1e-30):
        close(get("vespo")(**q, is_weights=torch.full((N, 1), value)), tiny)
    # Bounds of every token, ±20, and of their sum, log 1e-8 and 20.
    q["mask"][:] = True
    flat = get("vespo", k_pos=0.1, k_neg=0.1)
    apart = torch.tensor([50.0, -50.0] + [0.0] * (T - 2))
    close(flat(**{**q, "old_token_logps": q["token_logps"] - apart}), flat(**q))
    least = flat(**q, is_weights=torch.full((N, 1), 1e-8))
    close(flat(**{**q, "old_token_logps": q["token_logps"] + 50}), least)
    sharp = get("vespo", k_pos=1e4, lambda_pos=1e3, k_neg=1e4, lambda_neg=1e3)  # φ(e²) = e^13611
    assert sharp(**q, is_weights=torch.full((N, 1), math.exp(2))).isfinite().all()


@pytest.mark.parametrize("key", PER_TOKEN)
@given(seed=seeds)
@few
def test_a_weight_of_0_is_a_mask(key, seed):
    """It takes its token out, or its row, and leaves the others what they are."""
    q = inputs(key, seed)
    kept = torch.rand(N, T, generator=torch.Generator().manual_seed(seed)) < 0.5
    per_token = {"level": "token"} if key in ("luspo", "gspo") else {}
    weights = q["is_weights"]
    masked = evaluate(key, {**q, "is_weights": weights * kept}, **per_token)[1]
    beside = evaluate(key, {**q, "is_weights": weights.masked_fill(~kept, 1)}, **per_token)[1]
    close(masked, beside * kept)
    rows, gradient = evaluate(key, {**q, "is_weights": torch.zeros(N, 1).double()})
    assert (rows == 0).all() and (gradient == 0).all()


def test_few_tokens():
    """A global batch of no tokens counts as one token, whoever counts."""
    q = inputs("dapo", 7)
    one = get("dapo", num_tokens=1)(**q)
    for few_tokens in (0, -1, torch.tensor(0), torch.tensor(0.3)):
        close(get("dapo", num_tokens=few_tokens)(**q), one)


def test_missing_and_conflicting():
    q = inputs("grpo", 5, optional=False)
    for key in PENALISED:
        with pytest.raises(ValueError, match=r"^ref_token_logps: expected .* beta = 0.1, got None"):
            get(key, beta=0.1)(**q)
        with pytest.raises(ValueError, match=r"^entropy: expected .*entropy_coef = 0.1, got None"):
            get(key, entropy_coef=0.1)(**q)
    with pytest.raises(ValueError, match=r"^min_ratio: expected at most max_ratio = 1.0, got 2.0"):
        get("cispo", min_ratio=2.0, max_ratio=1.0)(**q)
    with pytest.raises(ValueError, match=r"^level: expected one of token, sequence"):
        get("grpo", level="row")
    with pytest.raises(ValueError, match=r"^advantages: expected shape \(5,\), got \(5, 6\)"):
        get("rloo")(**{**q, "advantages": q["token_logps"]})


@given(seed=seeds)
@few
def test_critics(seed):
    """Without a clip PPO's critic is half the mean square; at its optimum OREO has no error."""
    q = inputs("ppo_value", seed)
    half = 0.5 * (q["values"] - q["returns"])[q["mask"]].square().mean()
    close(get("ppo_value", clip=1e9)(**q).mean(), half)
    assert (get("ppo_value")(**q) >= get("ppo_value", clip=1e9)(**q) - 1e-12).all()

    q = inputs("oreo", seed, optional=False)
    x = (q["token_logps"] - q["ref_token_logps"]) * q["mask"]
    rest = torch.stack([x[:, t:].sum(-1) for t in range(T)], -1)
    q["values"] = q["scores"][:, None] - 0.3 * rest
    free = {"beta": 0.3, "kl_coef": 0.0}
    zero = torch.zeros(N).double()
    close(get("oreo", **free)(**q), zero)
    close(get("oreo_value", beta=0.3)(**q), zero)
    q["values"] = q["values"] + 0.7
    close(get("oreo", **free)(**q), get("oreo_value", beta=0.3)(**q))
    one, some = torch.ones(N, T).double(), q["mask"].any(-1).double()
    kl = get("oreo", beta=0.3, kl_coef=0.2)(**q, token_reverse_kl=one) - get("oreo", **free)(**q)
    close(kl, 0.2 * some)


@given(seed=seeds)
@few
def test_nash_md(seed):
    q = inputs("nash_md", seed)
    tie = {**q, "scores": torch.full((N,), 0.5), "ref_token_logps": q["token_logps"]}
    for level in ("sequence", "token"):
        assert (evaluate("nash_md", tie, level=level)[1] == 0).all()
    short = {n: x[:, :1] if x.ndim == 2 else x for n, x in q.items()}
    agree(evaluate("nash_md", short), evaluate("nash_md", short, level="token"))
    centred = {"token_logps": q["token_logps"], "mask": q["mask"], "advantages": q["scores"] - 0.5}
    agree(evaluate("nash_md", q, beta=0.0), evaluate("reinforce", centred))


@given(seed=seeds)
@few
def test_steps_of_direct_advantage(seed):
    """Ids are names: any numbers, in any order, contiguous or not; unscored tokens have none."""
    q = inputs("direct_advantage", seed)
    expected = evaluate("direct_advantage", q)
    names = torch.tensor([2**40, 0, 7])
    renamed = torch.where(q["segments"] >= 0, names[q["segments"].clamp(min=0)], -5)
    agree(evaluate("direct_advantage", {**q, "segments": renamed}), expected)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    rows, gradient = evaluate("direct_advantage", {n: x[:, order] for n, x in q.items()})
    agree((rows, gradient), (expected[0], expected[1][:, order]))
    none = {**q, "segments": torch.full((N, T), -1)}
    assert all((x == 0).all() for x in evaluate("direct_advantage", none))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32])
def test_steps_in_any_dtype(dtype):
    """An unscored position has the step -1, which is 255 among unsigned numbers."""
    q = inputs("direct_advantage", 0)
    q["segments"] = q["segments"].clamp(min=0)
    assert not q["mask"].all()
    narrow = {**q, "segments": q["segments"].to(dtype)}
    agree(evaluate("direct_advantage", narrow), evaluate("direct_advantage", q))


@given(seed=seeds)
@few
def test_one_step_of_direct_advantage_is_ipo(seed):
    """A constant advantage in one step: half of ipo against no rejected side, shifted to A/beta."""
    q = inputs("direct_advantage", seed)
    q["segments"] = torch.zeros(N, T, dtype=torch.int64)
    q["advantages"] = torch.full((N, T), 0.5).double()
    q["mask"][0] = True
    x = ((q["token_logps"] - q["ref_token_logps"]) * q["mask"]).sum(-1)
    ipo = get("ipo", beta=0.3)(x, torch.zeros(N).double())
    some = q["mask"].any(-1)
    close(get("direct_advantage", beta=0.3)(**q)[some], 0.5 * ipo[some])


def test_numbers_are_not_rounded_to_float32():
    """torch.where of two Python floats is float32: sapo's 1.05 and vespo's k would lose digits."""
    q = inputs("sapo", 6, optional=False)
    q["mask"][0] = True
    q["advantages"] = -q["advantages"].abs()
    rows = get("sapo")(**{**q, "old_token_logps": q["token_logps"] - 0.1})
    gate = 1 / (1 + math.exp(-1.05 * (math.exp(0.1) - 1)))
    expected = torch.where(q["mask"].any(-1), -4 / 1.05 * gate * q["advantages"], 0)
    close(rows, expected, rtol=1e-13, atol=0)

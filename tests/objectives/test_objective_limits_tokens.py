"""Limits and identities of the token-level pairs: each entry where it is another one."""

from functools import partial

import torch
from _objective_truth import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import compose, get

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**20)
B = 5


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def tokens(seed: int):
    """Token quantities of one batch, by name; the first pair is empty."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for side in ("chosen", "rejected"):
        mask = torch.rand(B, 6, generator=g) < 0.7
        mask[0] = False
        made[f"{side}_mask"] = mask
        for name in (f"{side}_token_logps", f"ref_{side}_token_logps"):
            made[name] = -torch.rand(B, 6, generator=g, dtype=torch.float64)
    return made


def sums(q):
    """(a, b) of token quantities."""
    return (
        ((q[f"{side}_token_logps"] - q[f"ref_{side}_token_logps"]) * q[f"{side}_mask"]).sum(-1)
        for side in ("chosen", "rejected")
    )


def pair(name: str, value):
    return {f"chosen_{name}": value, f"rejected_{name}": value}


@given(seed=seeds)
@few
def test_token_level_forms_of_dpo(seed):
    q = tokens(seed)
    a, b = sums(q)
    plain, one = get("dpo")(a, b), torch.ones(B, 6, dtype=torch.float64)
    weights, kl = pair("token_weights", one), pair("token_kl", one)
    segments = pair("segments", torch.zeros(B, 6, dtype=torch.int64))
    close(get("ld_dpo")(**q, ld_alpha=1.0), plain)
    close(get("mask_dpo")(**q, **weights), plain)
    close(get("opa_dpo")(**q, level="sequence"), plain)
    close(get("rrpo")(**q, **segments, chosen_token_kl=one, alpha=0.0), plain)
    none = {name: 0 * x for name, x in weights.items()}
    for form in ("policy", "own"):
        close(get("dpo_bmc")(**q, **none, beta=0.1, ref_weighting=form), plain)
    free = {"lambda_u": 0.0, "lambda_d": 0.0}
    close(get("sparse_po")(**q, **weights, **pair("token_kl", 0 * one), **free), plain)
    masks = {name: q[name] for name in ("chosen_mask", "rejected_mask")}
    close(get("tdpo")(a, b, **kl, **masks, alpha=0.0), plain)
    first = get("sparse_po")(**q, **weights, **kl, **free)
    close(get("tdpo")(a, b, **kl, **masks, version=1), first)
    close(get("tdpo")(a, b, **kl, **masks, alpha=1.0), first)


@given(seed=seeds)
@few
def test_thin_token_entries(seed):
    q = tokens(seed)
    squares = pair("log_sum_sq_probs", -q["chosen_token_logps"].square())
    a, b = sums(q)
    policy = {name: x for name, x in q.items() if not name.startswith("ref_")}
    weights = get("wpo_weights")(**policy, **squares)
    close(get("wpo")(**q, **squares), get("dpo")(a, b, **weights))
    shorter = compose("dpo", partial(get("ld_logps"), ld_alpha=0.3))
    close(get("ld_dpo")(**q, ld_alpha=0.3), shorter(**q))


def test_wpo_of_impossible_weights_is_finite():
    """log Σ p² far below 2·log p, as of other tokens: each side's exponential alone may be e⁴⁰."""
    q = {name: x.float() if x.is_floating_point() else x for name, x in tokens(0).items()}
    squares = pair("log_sum_sq_probs", torch.full_like(q["chosen_token_logps"], -1e4))
    q["ref_chosen_token_logps"] = torch.full_like(q["chosen_token_logps"], 1e4)
    assert get("wpo")(**q, **squares, beta=3.0).isfinite().all()


def test_nothing_in_common():
    """opa_dpo without a position scored on both sides: 0, and no gradient."""
    q = tokens(1)
    q["rejected_mask"] = ~q["chosen_mask"]
    leaf = q["chosen_token_logps"].requires_grad_()
    rows = get("opa_dpo")(**q)
    rows.sum().backward()
    assert rows.tolist() == [0.0] * B
    assert leaf.grad.abs().sum() == 0


def test_a_bound_that_is_none():
    """dpo_bmc weighs a token by at most e^40."""
    q = tokens(3)
    q["rejected_token_logps"] = torch.full((B, 6), -1e3)
    weights = pair("token_weights", torch.ones(B, 6))
    assert get("dpo_bmc", delta=1e300)(**q, **weights).isfinite().all()


def test_gate_of_cringe():
    """The gate closes on pairs that are won; detached it leaves the loss where it was."""
    cringe = get("pairwise_cringe")
    inputs = make_inputs(cringe, seed=2)
    inputs["chosen_logps"], inputs["rejected_logps"] = torch.tensor([[0.0], [-400.0]]).expand(2, 6)
    close(cringe(**inputs), torch.zeros(6, dtype=torch.float64))
    inputs["chosen_logps"] = torch.full((6,), -1000.0)
    open_ = cringe(**inputs, alpha=0.0)
    close(open_, torch.full_like(open_, 1000.0))
    close(cringe(**inputs, detach_gate=True), cringe(**inputs))

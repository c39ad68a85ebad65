"""Limits and identities of the denoising objectives."""

import pytest
import torch
from _objective_truth import make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import compose, get

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**20)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


@given(seed=seeds, beta=st.floats(0.1, 5))
@few
def test_diffusion_dpo_is_dpo_on_errors(seed, beta):
    q = make_inputs(get("diffusion_dpo"), seed=seed)
    rows = get("diffusion_dpo", beta=beta)(**q)
    composed = compose(get("dpo", beta=beta), get("denoising_logratios"))
    close(composed(**q), rows)
    plain = {name: x for name, x in q.items() if name.endswith("errors")}
    ones = torch.ones_like(q["chosen_errors"])
    loss = get("diffusion_dpo", beta=beta)
    close(loss(**plain, timestep_weights=ones, soft_labels=ones), loss(**plain))
    weighted = loss(**plain, sft_weight=0.4) - loss(**plain)
    close(weighted, 0.4 * q["chosen_errors"])
    same = loss(*2 * (q["chosen_errors"], q["rejected_errors"]))
    close(same, torch.full_like(same, 2.0).log())


def sides(seed: int, spread: float):
    """prdp's quantities, with the sampler at most `spread` from the policy."""
    q = make_inputs(get("prdp"), seed=seed)
    for side in ("chosen", "rejected"):
        g = torch.Generator().manual_seed(seed)
        logps = q[f"{side}_token_logps"]
        noise = 2 * torch.rand(logps.shape, generator=g, dtype=logps.dtype) - 1
        q[f"old_{side}_token_logps"] = logps.detach() + spread * noise
        q[f"{side}_token_logps"] = logps.requires_grad_()
    return q


@given(seed=seeds)
@few
def test_prdp_unclipped_is_egpo(seed):
    q = sides(seed, 0.1)
    ratios = {}
    for side in ("chosen", "rejected"):
        gap = q[f"{side}_token_logps"] - q[f"ref_{side}_token_logps"]
        ratios[f"{side}_logratios"] = (gap * q[f"{side}_mask"]).sum(-1)
        ratios[f"{side}_scores"] = q[f"{side}_scores"]
    expected = get("egpo", beta=2.0)(**ratios)
    for epsilon in (0.2, 1e6):
        rows = get("prdp", beta=2.0, epsilon=epsilon)(**q)
        close(rows, expected)
        leaves = q["chosen_token_logps"], q["rejected_token_logps"]
        ours, theirs = (
            torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (rows, expected)
        )
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


def test_prdp_stops_pushing():
    """Past ε in the direction of the target there is no more gradient; before it there is."""
    mask, zero, score = torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1)
    for moved, pushes in ((0.05, True), (0.2, False)):
        won = torch.full((1, 1), moved, requires_grad=True)
        # The target is 1: going up is right, and clipped at 0.1.
        rows = get("prdp", beta=1.0, epsilon=0.1)(
            won, zero, zero, zero, zero, zero, mask, mask, score + 1, score
        )
        (gradient,) = torch.autograd.grad(rows.sum(), won)
        assert bool((gradient != 0).all()) == pushes


@given(seed=seeds, beta=st.floats(0.5, 5))  # e^40 is not reached
@few
def test_weighted_denoising(seed, beta):
    q = make_inputs(get("reward_weighted_denoising"), seed=seed)
    loss = get("reward_weighted_denoising", beta=beta)
    close(loss(q["errors"], 0 * q["scores"]), q["errors"])
    shifted = loss(q["errors"], q["scores"] + 0.3)
    close(shifted, torch.tensor(0.3 / beta).double().exp() * loss(**q), rtol=1e-6)


def test_score_differences():
    q = make_inputs(get("distillation_dpo"))
    moves = [q[f"{side}_displacements"].requires_grad_() for side in ("chosen", "rejected")]
    rows = get("distillation_dpo")(**q)
    won, lost = torch.autograd.grad(rows.sum(), moves)
    close(won, q["chosen_score_gaps"] / 4)
    close(lost, -q["rejected_score_gaps"] / 4)
    empty = torch.zeros(2, 0)
    assert get("distillation_dpo")(empty, empty, empty, empty).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"^chosen_displacements: expected shape \(6, 4\)"):
        get("distillation_dpo")(**{**q, "chosen_displacements": moves[0][:, :3]})

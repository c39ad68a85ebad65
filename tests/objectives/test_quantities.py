"""Quantities by name: what is derived, from what, and what the errors say."""

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo import quantities
from fastpo.objectives import compose, get
from fastpo.quantities import SINGLES, Quantities

B, T = 3, 4
few = settings(max_examples=25, deadline=None)
row_lengths = st.lists(st.integers(0, T), min_size=2, max_size=8).filter(lambda n: len(n) % 2 == 0)


def stats(*shape: int, seed: int = 0, dtype=torch.float64) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)
    logps, entropy, squares = torch.rand(3, *shape, generator=g, dtype=dtype)
    return SimpleNamespace(logps=-logps, entropy=entropy, log_sum_sq_probs=-squares, lse=None)


def mask(*shape: int, seed: int = 9):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def test_pairs():
    policy, reference, scored = stats(2 * B, T), stats(2 * B, T, seed=1), mask(2 * B, T)
    q = quantities.padded(policy, scored, ref=reference)
    c, r = (policy.logps * scored).sum(-1).split(B)
    c0, r0 = (reference.logps * scored).sum(-1).split(B)
    for name, expected in {
        "chosen_logps": c,
        "rejected_logps": r,
        "ref_chosen_logps": c0,
        "ref_rejected_logps": r0,
        "chosen_logratios": c - c0,
        "rejected_logratios": r - r0,
        "chosen_lengths": scored[:B].sum(-1),
        "rejected_mask": scored[B:],
        "chosen_entropy": policy.entropy[:B],
        "rejected_log_sum_sq_probs": policy.log_sum_sq_probs[B:],
        "ref_rejected_token_logps": reference.logps[B:],
    }.items():
        torch.testing.assert_close(q[name], expected)
        assert name in q
    assert "soft_labels" not in q
    assert "ref_chosen_entropy" not in q


def test_singles_and_triples():
    policy, scored = stats(3 * B, T), mask(3 * B, T)
    q = quantities.padded(policy, scored, sides=SINGLES, old=policy.logps, ref=policy)
    assert q["logratios"].abs().sum() == 0
    assert q["old_token_logps"].shape == (3 * B, T)
    assert q["lengths"].shape == (3 * B,)
    taught = quantities.padded(policy, scored, sides=SINGLES, teacher=policy)
    assert taught.rows(get("opd")).abs().sum() == 0
    triple = quantities.padded(policy, scored, sides=("chosen", "rejected", "third"))
    total = (policy.logps * scored).sum(-1)
    torch.testing.assert_close(triple["third_logps"], total[2 * B :])
    assert triple["third_lengths"].tolist() == scored[2 * B :].sum(-1).tolist()
    both = quantities.padded(policy, scored, sides=("", "third", "unlabeled"))
    torch.testing.assert_close(both["unlabeled_logps"], total[2 * B :])


def test_history_sums_per_policy():
    tokens, scored = stats(5, B, T).logps, mask(B, T)
    q = Quantities({"history_chosen_token_logps": tokens, "chosen_mask": scored})
    torch.testing.assert_close(q["history_chosen_logps"], (tokens * scored).sum(-1))


@given(rows=row_lengths, seed=st.integers(0, 9))
@few
def test_packed_equals_padded(rows, seed):
    """Sequences end to end and the same ones padded give the same numbers and gradients."""
    offsets = torch.tensor([0, *rows]).cumsum(0)
    flat, reference = stats(sum(rows) + 2, seed=seed), stats(sum(rows) + 2, seed=seed + 50)
    scored = mask(sum(rows) + 2, seed=seed)
    index = offsets[:-1, None] + torch.arange(T)
    inside = torch.arange(T) < torch.tensor(rows)[:, None]
    index = torch.where(inside, index, 0)

    def pad(one):
        return SimpleNamespace(**{n: None if x is None else x[index] for n, x in vars(one).items()})

    leaf = flat.logps.requires_grad_()
    ours = quantities.packed(flat, offsets, mask=scored, width=T, ref=reference)
    theirs = quantities.padded(pad(flat), inside & scored[index], ref=pad(reference))
    for name in ("chosen_logratios", "rejected_logps", "chosen_lengths", "rejected_mask"):
        torch.testing.assert_close(ours[name], theirs[name])
    for name in ("chosen_token_logps", "ref_rejected_token_logps", "chosen_entropy"):
        keep = theirs[name.split("_")[-3] + "_mask" if "token" in name else "chosen_mask"]
        torch.testing.assert_close(ours[name] * keep, theirs[name] * keep)
    gradients = [
        torch.autograd.grad(q.rows(get("ipo")).sum(), leaf, allow_unused=True)[0]
        for q in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0][offsets[-1] :].abs().sum() == 0


def test_packed_without_width_has_sums_only():
    offsets = torch.tensor([0, 2, 5, 5, 9], dtype=torch.int32)
    q = quantities.packed(stats(9), offsets)
    assert q["chosen_lengths"].tolist() == [2, 3]
    assert q["rejected_lengths"].tolist() == [0, 4]
    assert q["rejected_logps"][0] == 0
    message = r"^chosen_token_logps: expected .* or packed\(..., width=...\), got "
    with pytest.raises(ValueError, match=message):
        q["chosen_token_logps"]


def test_long_sums_keep_float32():
    """A sum token by token in float32 is wrong in the fifth digit at this length."""
    n = 200_000
    logps = torch.full((n,), -0.1)
    q = quantities.packed(logps, torch.tensor([0, n]), sides=SINGLES)
    assert abs(q["logps"].item() + 0.1 * n) < 2e-3
    padded = quantities.padded(logps[None], torch.ones(1, n).bool(), sides=SINGLES)
    assert abs(padded["logps"].item() + 0.1 * n) < 2e-2


def test_masked_positions_do_not_matter():
    policy, scored = stats(2, T, dtype=torch.float32), mask(2, T)
    leaf = policy.logps.masked_fill(~scored, float("inf")).requires_grad_()
    q = quantities.padded(leaf, scored, reference_free=True)
    rows = q.rows(get("dpo"))
    assert rows.isfinite().all()
    assert torch.autograd.grad(rows.sum(), leaf)[0].isfinite().all()
    given = {"mask": scored.flatten(), "reference_free": True}
    flat = quantities.packed(leaf.flatten(), torch.tensor([0, T, 2 * T]), **given)
    torch.testing.assert_close(flat.rows(get("dpo")), rows)
    assert torch.autograd.grad(flat.rows(get("dpo")).sum(), leaf)[0].isfinite().all()


def test_half_precision_is_summed_and_subtracted_in_float32():
    logps, scored = stats(2, T).logps.bfloat16(), torch.ones(2, T)
    padded = quantities.padded(logps, scored, ref=logps / 3)
    offsets = torch.tensor([0, T, 2 * T])
    flat = logps.flatten()
    packed = quantities.packed(flat, offsets, mask=scored.flatten(), ref=flat / 3)
    given = Quantities({n: padded[n].bfloat16() for n in ("chosen_logps", "ref_chosen_logps")})
    for q in (padded, packed, given):
        expected = q["chosen_logps"].float() - q["ref_chosen_logps"].float()
        assert torch.equal(q["chosen_logratios"], expected)
    assert padded["chosen_logps"].dtype == packed["chosen_logps"].dtype == torch.float32
    torch.testing.assert_close(packed["chosen_logps"], padded["chosen_logps"])
    assert padded["chosen_mask"].dtype == torch.bool and padded["chosen_lengths"].tolist() == [T]


def test_reference_is_constant_and_never_invented():
    policy, scored = stats(2 * B, T), mask(2 * B, T)
    reference = stats(2 * B, T, seed=1).logps.requires_grad_()
    q = quantities.padded(policy.logps.requires_grad_(), scored, ref=reference)
    q["chosen_logratios"].sum().backward()
    assert reference.grad is None
    assert policy.logps.grad is not None
    bare = quantities.padded(policy, scored)
    message = (
        r"^chosen_logratios: expected a column of that name, ref_chosen_logps, "
        r"padded\(..., ref=...\) or reference_free=True, got chosen_mask, rejected_mask, "
    )
    with pytest.raises(ValueError, match=message):
        bare.rows(get("dpo"))
    free = quantities.padded(policy, scored, reference_free=True) | {"margins": None}
    torch.testing.assert_close(free["chosen_logratios"], free["chosen_logps"])


def test_for_objective():
    a = torch.zeros(B)
    q = Quantities({"chosen_logratios": a, "rejected_logratios": a, "margins": a, "extra": a})
    assert list(q.for_objective(get("dpo"))) == [
        "chosen_logratios",
        "rejected_logratios",
        "margins",
    ]
    assert list(q.for_objective(get("dpo", beta=1.0))) == list(q.for_objective(get("dpo")))
    bound = functools.partial(get("dpo"), rejected_logratios=a)
    assert "rejected_logratios" not in q.for_objective(bound)
    torch.testing.assert_close(q.rows(bound), q.rows(get("dpo")))
    # A hyperparameter is no column.
    assert "beta" not in (q | {"beta": a}).for_objective(get("dpo"))
    more = q | {"soft_labels": a + 1, "unused": None}
    assert "soft_labels" in more.for_objective(get("dpo"))
    assert "unused" not in more
    with pytest.raises(
        ValueError, match=r"^chosen_lengths: expected a column of that name or chosen_mask, got"
    ):
        q.for_objective(get("dpo_norm"))
    with pytest.raises(ValueError, match=r"^kl_logratios: .* column of that name, got nothing"):
        Quantities({}).derive("kl_logratios")


def test_what_was_not_given_is_named():
    """An argument of `padded` where that is the slip."""
    policy, scored = stats(2 * B, T), mask(2 * B, T)
    pairs, singles = (
        quantities.padded(policy, scored, sides=x) for x in (("chosen", "rejected"), ("",))
    )
    for q, key, expected in (
        (pairs, "grpo", r'token_logps: expected padded\(..., sides=\("",\)\) for single resp'),
        (singles, "dpo", r'chosen_logratios: expected padded\(..., sides=\("chosen", "rejected"'),
        (
            singles,
            "kto",
            r"logratios: expected .*, ref_logps, padded\(..., ref=...\) or reference_free",
        ),
        (singles, "grpo", r"advantages: expected a column of that name, got mask, token_logps"),
    ):
        with pytest.raises(ValueError, match=f"^{expected}"):
            q.rows(get(key))
    with pytest.raises(ValueError, match=r"^sampler_token_logps: .* or padded\(..., sampler=...\)"):
        singles["sampler_token_logps"]
    for one, got in (("dpo", "'dpo'"), (None, "None"), (["dpo"], r"\['dpo'\]")):
        gives = rf"^objective: expected .* fastpo.objectives.get\('dpo'\) gives, got {got}$"
        with pytest.raises(ValueError, match=gives):
            pairs.rows(one)
    flat, offsets = policy.logps.flatten(), torch.tensor([0, 3])
    for call, name in (
        (lambda: quantities.padded(policy, [1]), "mask"),
        (lambda: quantities.padded([1.0], scored), "token_logps"),
        (lambda: quantities.padded(policy, scored, ref=[1.0]), "ref_token_logps"),
        (lambda: quantities.packed(flat, [0, 3]), "offsets"),
        (lambda: quantities.packed(flat, offsets, mask=[1]), "mask"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor, got list"):
            call()


@pytest.mark.parametrize("column", [[1.0, 2.0], lambda: [1.0, 2.0]])
def test_columns_are_tensors(column):
    q = Quantities({}) | {"margins": column}
    assert "margins" in q  # a column that nobody reads may be anything
    with pytest.raises(ValueError, match=r"^margins: expected a tensor or a function.*, got list"):
        q["margins"]


def test_only_what_is_asked_is_computed():
    calls = []

    def costly():
        calls.append(1)
        return torch.zeros(B)

    q = Quantities({"chosen_logratios": costly, "rejected_logratios": costly, "margins": costly})
    q.rows(get("hinge"))
    q.rows(get("ipo"))
    assert len(calls) == 2


def test_losses_that_are_no_rows():
    q = Quantities({"chosen_token_logps": torch.randn(B, T)})
    for reduce in (lambda x: x, torch.mean, lambda x: (x, None)):
        with pytest.raises(ValueError, match="objective: expected one loss per row"):
            q.rows(lambda chosen_token_logps, reduce=reduce: reduce(chosen_token_logps))


def test_losses_whose_parameters_have_no_names():
    class Loss(torch.nn.Module):
        def forward(self, chosen_logps):
            return -chosen_logps

    q = Quantities({"chosen_logps": torch.zeros(B)})
    assert q.rows(Loss().forward).shape == (B,)
    for objective, got in ((Loss(), r"Loss\(\*args"), (lambda **given: given, r"<lambda>\(\*\*")):
        with pytest.raises(ValueError, match=rf"^objective: expected .*named .*, got {got}"):
            q.rows(objective)


def test_weights_of_rows():
    a, w = torch.randn(B), torch.tensor([0.0, 1.0, 3.0])
    q = Quantities({"chosen_logratios": a, "rejected_logratios": -a, "pair_weights": w})
    for key in ("dpo", "hinge"):
        torch.testing.assert_close(q.rows(get(key), beta=0.3), w * get(key)(a, -a, beta=0.3))
    tokens = {n: torch.zeros(B, T) for n in ("chosen_token_logps", "rejected_token_logps")}
    tokens |= {n: torch.ones(B, T).bool() for n in ("chosen_mask", "rejected_mask")}
    also = (q | {"sample_weights": 2 * w}).rows(get("dpo"))
    torch.testing.assert_close(also, 2 * w * w * get("dpo")(a, -a))
    twice = (q | tokens).rows(compose("dpo", "wpo_weights"))
    torch.testing.assert_close(twice, w * get("dpo")(a, -a))
    with pytest.raises(ValueError, match=r"^pair_weights: expected shape \(3,\), got \(2,\)"):
        (q | {"pair_weights": w[:2]}).rows(get("hinge"))
    constant = q | {"pair_weights": w.requires_grad_()}
    assert not constant.rows(get("hinge")).requires_grad


def test_shapes():
    scored = mask(2 * B, T)
    with pytest.raises(ValueError, match=r"^token_logps: expected shape \(6, 4\), got \(6, 3\)"):
        quantities.padded(stats(2 * B, T - 1), scored)
    with pytest.raises(
        ValueError, match=r"^ref_token_logps: expected shape \(6, 4\), got \(6, 3\)"
    ):
        quantities.padded(stats(2 * B, T), scored, ref=stats(2 * B, T - 1))
    with pytest.raises(
        ValueError, match=r"^rows: expected a multiple of 2 \(chosen, rejected\), got 3"
    ):
        quantities.padded(stats(3, T), mask(3, T))
    with pytest.raises(
        ValueError, match=r"^stats: expected log-probabilities in stats.logps, got None"
    ):
        quantities.padded(SimpleNamespace(logps=None), scored)
    for misspelt in ("old_logps", "reference"):  # or grpo would take the policy for on-policy
        message = rf"^under: expected models among ref, old, .*, got {misspelt}$"
        with pytest.raises(ValueError, match=message):
            quantities.padded(stats(2 * B, T), scored, **{misspelt: None})
    with pytest.raises(ValueError, match=r"^sides: expected at least one, got \(\)"):
        quantities.padded(stats(2 * B, T), scored, sides=())
    with pytest.raises(ValueError, match=r"^width: expected at least 0, got -1"):
        quantities.packed(stats(5), torch.tensor([0, 2, 5]), width=-1)
    with pytest.raises(ValueError, match=r"^mask: expected shape \(5,\), got \(4,\)"):
        quantities.packed(stats(5), torch.tensor([0, 2, 5]), mask=mask(4))
    empty = quantities.padded(stats(0, T), mask(0, T), reference_free=True)
    assert empty.rows(get("dpo")).shape == (0,)
    nothing = quantities.packed(stats(0), torch.tensor([0, 0, 0]), width=2, reference_free=True)
    assert torch.equal(nothing["chosen_token_logps"], torch.zeros(1, 2, dtype=torch.float64))
    assert nothing.rows(get("simpo")).isfinite().all()
    no_rows = quantities.packed(stats(4), torch.tensor([0]), reference_free=True)
    assert no_rows.rows(get("dpo")).shape == (0,)


def test_no_value_is_read_on_the_host():
    """Meta tensors have no values: whoever reads one, raises."""
    flat, offsets = torch.empty(9, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
    q = quantities.packed(flat, offsets, width=4, ref=flat)
    scored = torch.empty(4, 5, dtype=torch.bool, device="meta")
    p = quantities.padded(
        torch.empty(4, 5, device="meta"), scored, ref=torch.empty(4, 5, device="meta")
    )
    for one in (q, p):
        for key in ("dpo", "dpo_norm", "simpo", "orpo", "aot"):
            assert one.rows(get(key)).device.type == "meta"
        assert one.rows(compose("dpo", "ld_logps", "wpo_weights", sft_weight=0.1)).shape == (2,)


BEYOND = [
    ([0, 2, 5, 5, 400], None, r"offsets: expected ascending in \[0, 7\], got \[0, 2, 5, 5, 400\]"),
    ([0, 3, 2, 5, 7], None, "offsets: expected ascending in"),
    ([-1, 2, 3, 5, 7], None, "offsets: expected ascending in"),
    (
        [0.0, 2.0, 7.0],
        None,
        r"offsets: expected integers of shape \(rows \+ 1,\), got torch.float32",
    ),
    ([[0, 7]], None, r"offsets: expected integers .* got torch.int64 of \(1, 2\)"),
    ([0, 2, 7], 4, "width: expected at least the longest row, 5, got 4"),
]


@pytest.mark.parametrize(("offsets", "width", "message"), BEYOND)
def test_rows_beyond_the_tokens(offsets, width, message):
    with pytest.raises(ValueError, match=message):
        quantities.packed(torch.randn(7), torch.tensor(offsets), width=width)


@pytest.mark.parametrize(("offsets", "width"), [([0, 2, 400], 9), ([3, 2, 7], 9), ([0, 2, 7], 4)])
def test_rows_beyond_the_tokens_on_a_gpu(offsets, width, monkeypatch):
    """Nobody waits for them there."""
    given = torch.tensor(offsets)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"), raising=False)
    within, right = quantities._readable(given, 7, width)
    assert right.isnan() and within.min() >= 0 and within.max() <= 7
    assert quantities._readable(torch.tensor([0, 2, 7]), 7, 5)[1] == 0


def test_what_cannot_be_read_is_nan(monkeypatch):
    """Sums and tokens, of offsets that a GPU was given."""
    offsets = torch.tensor([0, 3, 7])
    monkeypatch.setattr(quantities, "_readable", lambda *_: (offsets, torch.tensor(torch.nan)))
    q = quantities.packed(torch.randn(7), offsets, width=4)
    assert q["chosen_logps"].isnan().all() and q["chosen_token_logps"][:, :3].isnan().all()


def test_offsets_of_attention_kernels():
    """int32, as cu_seqlens are."""
    logps = torch.randn(7)
    q = quantities.packed(logps, torch.tensor([0, 3, 7], dtype=torch.int32), width=4)
    torch.testing.assert_close(q["rejected_logps"], logps[3:].sum()[None])


def test_one_graph():
    def padded(logps):
        return quantities.padded(logps, scored, ref=-scored.float())

    def packed(logps):
        under = {"mask": scored.flatten(), "ref": -scored.float().flatten()}
        return quantities.packed(logps.flatten(), offsets, width=T, **under)

    scored, offsets, logps = mask(4, T), torch.arange(5) * T, stats(4, T).logps
    for made in (padded, packed):

        def rows(logps, made=made):
            return made(logps).rows(get("dpo", beta=0.3))

        whole = torch.compile(rows, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(logps), rows(logps))

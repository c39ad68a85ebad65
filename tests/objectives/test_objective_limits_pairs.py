"""Limits and identities of the pairs: each entry where it is another one."""

import inspect
import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import compose, get
from fastpo.objectives._registry import quantities_of

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**20)
B, K = 5, 3


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def columns(seed: int, count: int):
    """`count` columns of log-probabilities, log-ratios or scores."""
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, B, generator=g, dtype=torch.float64)).unbind()


def lengths(seed: int, count: int = 2):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (count, B), generator=g).unbind()


@given(seed=seeds)
@few
def test_what_dpo_is_a_case_of(seed):
    a, b, y, y0, s = columns(seed, 5)
    plain = get("dpo")(a, b)
    close(get("f_dpo")(a, b), plain)
    close(get("flex_dpo")(a, b, beta_rejected=0.1), plain)
    close(get("focalpo")(a, b, gamma=0.0), plain)
    close(get("dpo_sft")(a, b, y, lengths(seed)[0], sft_weight=0.0), plain)
    close(get("odpo")(a, b, s, s + 1, alpha=0.0, kind="linear"), plain)
    close(get("odpo")(a, b, s + 1, s), plain)
    close(get("modpo")(a, b, s, s, w0=1.0), plain)
    close(get("mappo")(a, b, s + 1, s), plain)
    close(get("mmpo")(a, b, s, s), get("dpo")(a, b, label_smoothing=0.5))
    close(get("mcts_dpo")(a, b, s, -s.abs()), plain)
    close(get("hypo")(a, b, y, y0, lam=0.0), plain)
    close(get("vpo")(a, b, y, y0, alpha=0.0), plain)
    close(get("rationale_dpo")(a, b, y, gamma=0.0), plain)
    close(get("rdpo_visual")(a, b, y, y0, image_weight=0.0), plain)
    close(get("spa")(a, b, a, b, y, y0, alpha=0.0), plain)


@given(seed=seeds, divergence=st.sampled_from(["forward_kl", "js", "alpha"]))
@few
def test_thin_entries_are_their_composition(seed, divergence):
    a, b, c, y, s_w, s_l = columns(seed, 6)
    n_c, n_y = lengths(seed)
    sides = {"chosen_logratios": a, "rejected_logratios": b}
    scores = {"chosen_scores": s_w, "rejected_scores": s_l}
    score = partial(get("f_divergence"), divergence=divergence)
    close(get("f_dpo")(a, b, divergence=divergence), compose("dpo", score)(**sides))
    label = partial(get("score_labels"), scale=2.2)
    close(get("mmpo")(**sides, **scores), compose("dpo", label)(**sides, **scores))
    regular = compose("dpo", sft_weight=0.3, sft_reduction="batch")
    own = {"chosen_logps": c, "chosen_lengths": n_c}
    ours = get("dpo_sft", sft_weight=0.3, sft_reduction="batch")(**sides, **own)
    close(ours, regular(**sides, **own))
    gold = compose("dpo", third_weight=0.1)
    close(get("rationale_dpo")(a, b, y), gold(**sides, third_logps=y))
    close(get("tpo_triple")(a, b, c, n_c, beta=0.1), get("cpo")(a, b, n_c) + (a - c) / n_of(n_c))
    pair = (a, b, n_c, n_y)
    close(
        get("tpo_triple_l")(*pair, y, n_y, beta=2.0, gamma=1.0) + y / n_of(n_y),
        get("simpo")(*pair),
    )


def n_of(lengths):
    return lengths.clamp(min=1).double()


def test_no_offset_without_a_win():
    """odpo's log: nothing to learn at a tie, and no log of a negative gap."""
    a = torch.zeros(4, requires_grad=True)
    gap = torch.tensor([0.0, -1.0, 1e-30, 2.0])
    rows = get("odpo")(a, -a, gap, 0 * gap)
    rows.sum().backward()
    assert rows[:2].tolist() == [0.0, 0.0]
    assert a.grad[:2].tolist() == [0.0, 0.0]
    assert rows[3] > rows[2] > 0


def test_confidence_of_a_search():
    a, b = torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3)
    rows = get("mcts_dpo")(a, b, torch.tensor([3.0, 3.0, -5.0]), torch.tensor([1.0, 9.0, 0.25]))
    for row, e in zip(rows, (0.25, 0.5, 0.2), strict=True):
        close(row, get("dpo")(a, b, label_smoothing=e)[0], rtol=1e-6, atol=1e-7)


@given(seed=seeds)
@few
def test_squared_losses(seed):
    a, b, s_w, s_l = columns(seed, 4)
    one = torch.ones_like(a)
    close(2 * get("sppo")(a, b, one, 0 * one), get("sppo_hard")(a, b))
    close(get("online_ipo")(a, b, one), get("ipo")(a, b))
    close(get("online_ipo")(a, b, one / 2), (a - b).square())
    egpo = get("egpo")(a, b, s_w, s_l)
    close(get("copg")(a, b, s_w, s_l), 0.1 / 2 * egpo)
    close(get("egpo")(b, a, s_l, s_w), egpo)
    close(get("egpo")(a, b, s_l + 0.5, s_l), get("ipo")(a, b))


@given(seed=seeds, loss=st.sampled_from(["sigmoid", "ipo"]))
@few
def test_online_dpo_knows_no_order(seed, loss):
    a, b, s_w, s_l = columns(seed, 4)
    rows = get("online_dpo")(a, b, s_w, s_l, loss=loss)
    close(get("online_dpo")(b, a, s_l, s_w, loss=loss), rows)
    offline = get("dpo" if loss == "sigmoid" else "ipo")
    close(torch.where(s_w >= s_l, offline(a, b), offline(b, a)), rows)
    close(get("online_dpo")(a, b, s_w, s_w, loss=loss), offline(a, b))


@pytest.mark.parametrize("base", ["dpo", "ipo"])
@given(seed=seeds)
@few
def test_noisy_labels(base, seed):
    """Certain labels: the base loss. At odds: Bayes, whose weight has no gradient."""
    a, b = columns(seed, 2)
    given_, reversed_ = get(base)(a, b), get(base)(b, a)
    near = get("lcpo")(a / 30, b / 30, eta=1 - 1e-15, base=base)
    close(near, get(base)(a / 30, b / 30), rtol=1e-8)
    rows, turned = get("lcpo")(a, b, base=base), get("lcpo")(b, a, eta=0.1, base=base)
    close(rows, turned, rtol=1e-7)
    assert (rows <= torch.maximum(given_, reversed_) * (1 + 1e-12)).all()


@given(seed=seeds)
@few
def test_third_sequences(seed):
    a, b, y, y0 = columns(seed, 4)
    online, offline = (get("vpo")(a, b, y, y0, online=value) for value in (True, False))
    close(online + offline, 2 * get("dpo")(a, b))
    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(get("hypo")(a, b, leaf, y0, lam=0.3).sum(), leaf)
    close(gradient, 0.3 * (y - y0))
    mdpo = get("rdpo_visual")(a, b, y, y0, anchor_weight=1.0)
    image, anchor = get("dpo")(a, y - y0), get("dpo")(a, 0 * a)
    close(mdpo, get("dpo")(a, b) + image + anchor)
    n = torch.ones(B, dtype=torch.int64)
    close(get("typo")(a, b, y, y0, lam=0.0), get("cpo")(a, b, n, beta=1.0, cpo_alpha=0.0))


@given(seed=seeds)
@few
def test_past_policies(seed):
    c, r, c0, r0, *past = columns(seed, 4 + 2 * K)
    chosen, rejected = torch.stack(past[:K]), torch.stack(past[K:])
    models, history = (c, r, c0, r0), (chosen, rejected)
    mnpo, inpo = get("mnpo"), get("inpo")
    last = mnpo(*models, *history, history_weights=[7.0, 0.0, 0.0])
    close(last, inpo(*models, chosen[0], rejected[0]))
    same = (x[:1].expand(K, B) for x in history)
    close(mnpo(*models, *same, history_weights=[1, 2, 3]), last)
    close(mnpo(*models, *history, history_weights=[2, 2, 2]), mnpo(*models, *history))
    only = inpo(*models, c, r, ratio=1.0, eta=0.7)
    close(only, get("ipo")(c - c0, r - r0, beta=0.7))


@given(seed=seeds)
@few
def test_extrapolated_reference(seed):
    c, r, *past = columns(seed, 6)
    chosen, rejected = torch.stack(past[:2]), torch.stack(past[2:])
    apo = partial(get("apo_accelerated"), c, r)
    latest = get("dpo")(c - chosen[0], r - rejected[0])
    close(apo(chosen, rejected, alpha=0.0), latest)
    close(apo(chosen[:1].expand(2, B), rejected[:1].expand(2, B)), latest)
    with pytest.raises(ValueError, match=r"^history_chosen_logps: expected shape \(2, 5\), got"):
        apo(chosen[:1], rejected[:1])


@given(seed=seeds)
@few
def test_several_references(seed):
    c, r, *past = columns(seed, 2 + 2 * K)
    chosen, rejected = (-torch.stack(x).abs() for x in (past[:K], past[K:]))
    mrpo = partial(get("mrpo"), c, r)

    def dpo(k):
        return get("dpo")(c - chosen[k], r - rejected[k])

    for k in range(K):
        weights = [float(j == k) for j in range(K)]
        close(mrpo(chosen, rejected, weights=weights, clip=None), dpo(k))
    close(mrpo(chosen[:1], rejected[:1]), dpo(0))
    close(mrpo(chosen, rejected, clip=0.0), dpo(0))
    equal = mrpo(chosen, chosen, clip=None)  # no gap at all: uniform
    close(equal, mrpo(chosen, chosen, weights=[2, 2, 2], clip=None))
    close(equal, get("dpo")(c, r))


def test_weights_of_models_are_checked():
    x, past = torch.zeros(B), torch.zeros(K, B)
    mnpo = partial(get("mnpo"), x, x, x, x, past, past)
    mrpo = partial(get("mrpo"), x, x, past, past)
    for weights in ([1.0, 2.0], [0.0, 0.0, 0.0], []):
        text = r"expected 3 numbers with a positive sum, got \["
        with pytest.raises(ValueError, match=f"^history_weights: {text}"):
            mnpo(history_weights=weights)
        with pytest.raises(ValueError, match=f"^weights: {text}"):
            mrpo(weights=weights)
    with pytest.raises(ValueError, match=r"^history_chosen_logps: expected at least one reference"):
        get("mrpo")(x, x, past[:0], past[:0])
    close(get("mnpo")(x, x, x, x, past[:0], past[:0]), mnpo())


@given(seed=seeds)
@few
def test_neighbours_in_the_batch(seed):
    a, b = columns(seed, 2)
    e = torch.stack(columns(seed + 1, 4), -1)
    rpo = get("rpo_relative")
    alone = [rpo(a[i : i + 1], b[i : i + 1], e[i : i + 1]) for i in range(B)]
    close(torch.cat(alone), get("dpo")(a, b))
    close(rpo(a, b, 3 * e), rpo(a, b, e))
    same = torch.stack([get("dpo")(a, x.expand(B), beta=0.1 / B) for x in b]).mean(0)
    close(rpo(a, b, e[:1].expand(B, 4)), same)
    close(rpo(a, b, 0 * e), same)
    close(rpo(a, b, 1e-13 * e), same)
    strangers = rpo(a, b, torch.eye(B, dtype=e.dtype), tau=1e-3)
    close(strangers, get("dpo")(a, b) / B + math.log(2) * (B - 1) / B)


@given(seed=seeds)
@few
def test_without_a_reference(seed):
    c, r = (-x.abs() - 0.1 for x in columns(seed, 2))
    n_c, n_r = lengths(seed)
    n_c, n_r = n_c + 1, n_r + 1  # an empty completion is cut at -1e-6 by some
    sides = (c, r, n_c, n_r)
    constants = {"beta": 0.7, "gamma": 0.3}
    simpo = get("simpo")(*sides, **constants)
    close(get("alphapo")(*sides, **constants, alpha=0.0), simpo)
    close(get("alphapo")(*sides, **constants, alpha=1e-5), simpo, rtol=1e-2, atol=1e-3)
    close(get("asft_aligned")(*sides, lam=0.0), -c / n_c)
    logic = partial(get("dpa_logic"), *sides, beta=0.7)
    close(logic(variant="cpo"), get("simpo")(*sides, beta=0.7, gamma=0.0))
    odds = get("orpo")(*sides, beta=1.0) + c / n_c
    close(get("dpa_logic")(*sides, variant="orpo", beta=1.0), odds)


@pytest.mark.parametrize(
    ("key", "hidden"),
    [
        ("odpo", "chosen_scores"),
        ("online_dpo", "chosen_scores"),
        ("online_dpo", "rejected_scores"),
        ("spa", "mixed_chosen_logps"),
        ("spa", "ref_rejected_logps"),
    ],
)
def test_what_is_not_known_is_no_side_of_a_comparison(key, hidden):
    """The row was left out, or the pair taken the other way round."""
    names = quantities_of(get(key))
    q = dict(zip(names, columns(3, len(names)), strict=True))
    q[hidden] = q[hidden].index_fill(0, torch.tensor(1), math.nan)
    leaf = q["rejected_logratios"].requires_grad_()
    rows = get(key)(**q)
    assert rows.isnan().tolist() == [False, True, False, False, False]
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    assert gradient.isnan().tolist() == rows.isnan().tolist()


@pytest.mark.parametrize("c", [0.0, -1e-12, -1e-6, -500.0])
@pytest.mark.parametrize("r", [0.0, -1e-12, -1e-6, -500.0])
@pytest.mark.parametrize("key", ["asft_aligned", "dpa_logic", "alphapo"])
def test_certainty(key, c, r):
    cases = [{"variant": v} for v in ("ce", "ce_unl", "orpo", "ccpo", "cfunl", "uncpo", "qfunl")]
    for hyper in cases if key == "dpa_logic" else [{}]:
        for n in (0, 1):
            sides = [torch.tensor([x], requires_grad=True) for x in (c, r)]
            rows = get(key)(*sides, torch.tensor([n]), torch.tensor([1]), **hyper)
            rows.sum().backward()
            seen = [x.grad for x in sides if x.grad is not None]  # ce reads one side only
            assert all(x.isfinite().all() for x in (rows, *seen))


@given(seed=seeds)
@few
def test_unlabeled_responses(seed):
    c, r, u = columns(seed, 3)
    n_c, n_r, n_u = lengths(seed, 3)
    sides, none = (c, r, n_c, n_r), (u[:0], n_u[:0])
    simpo, sspo = get("simpo")(*sides), partial(get("sspo"), *sides)
    close(sspo(u, n_u, weight=1.0), simpo)
    close(sspo(*none), simpo / 2)
    only = sspo(u, n_u, weight=0.0)
    close(only, only[:1].expand(B))
    leaf = c.clone().requires_grad_()
    get("sspo")(leaf, r, n_c, n_r, u, n_u, weight=0.0, clip=100.0).sum().backward()
    lowest = (c / n_of(n_c)).argmin()  # the threshold has the gradient, nothing else
    assert leaf.grad.nonzero().flatten().tolist() in ([lowest], [])
    assert sspo(u, n_u, prior=1.0, weight=0.0)[0] >= 0


def trainer(**settings):
    """What a loss method of TRL reads from itself, on one process."""
    same = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    model = torch.nn.Module().eval()
    counters = {"_metrics": {"eval": defaultdict(list)}, "_total_train_tokens": 0}
    return SimpleNamespace(accelerator=accelerator, model=model, **counters, **settings)


def agree(ours, theirs, leaf):
    """Equal batch losses, and equal gradients in the leaf."""
    close(ours, theirs)
    (got,), (expected,) = (torch.autograd.grad(x, leaf, retain_graph=True) for x in (ours, theirs))
    close(got, expected)


@pytest.mark.parametrize("alpha", [0.25, -0.7, 0.0])
def test_trl_alphapo(alpha):
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    leaf, r = (-x.abs() for x in columns(3, 2))
    leaf.requires_grad_()
    stub = trainer(alpha=alpha, beta=2.5, loss_type="simpo", simpo_gamma=0.3, label_smoothing=0.1)
    n_c, n_r = (n + 1 for n in lengths(3))
    theirs = module.CPOTrainer.cpo_loss(stub, leaf / n_c, r / n_r)[0]
    ours = get("alphapo")(leaf, r, n_c, n_r, gamma=0.3, alpha=alpha, label_smoothing=0.1)
    agree(ours.mean(), theirs.mean(), leaf)


def tpo_rows(loss_type, alpha, sums, sizes):
    """TRL's TPO in our words; its hinge and ipo have no key of their own."""
    options = {"beta": 0.5, "alpha": alpha, "label_smoothing": 0.1, "sft_reduction": "batch"}
    gold = {"third_logps": sums["third_logps"], "third_lengths": sizes["third_lengths"]}
    if loss_type == "sigmoid":
        return get("tpo_triple")(sums["chosen_logps"], sums["rejected_logps"], **gold, **options)
    if loss_type == "tpo-l":
        return get("tpo_triple_l")(**sums, **sizes, gamma=0.3, **options)
    per_token = alpha * B / gold["third_lengths"].sum().item()
    base = get("hinge" if loss_type == "hinge" else "ipo_norm", beta=0.5)
    function = compose(base, third_weight=per_token, reference_free=True)
    wanted = inspect.signature(function).parameters
    return function(**{name: x for name, x in {**sums, **sizes}.items() if name in wanted})


@pytest.mark.parametrize("loss_type", ["sigmoid", "tpo-l", "hinge", "ipo"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_trl_tpo(loss_type, alpha):
    """Chosen, rejected and gold completions, through a model that is its logits."""
    module = pytest.importorskip("trl.experimental.tpo.tpo_trainer")
    g = torch.Generator().manual_seed(4)
    leaf = torch.randn(3 * B, 7, 9, generator=g, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, 9, leaf.shape[:2], generator=g)
    mask = torch.rand(leaf.shape[:2], generator=g) < 0.7
    mask[:, 1] = True
    rows = slice(0, 3 * B if alpha else 2 * B)  # TRL drops the gold answer when it has no weight
    columns = {"input_ids": ids, "attention_mask": 0 * ids + 1, "completion_mask": mask.long()}
    stub = trainer(beta=0.5, loss_type=loss_type, tpo_l_gamma=0.3)
    stub.tpo_alpha, stub.label_smoothing = alpha, 0.1
    theirs = module.TPOTrainer._compute_loss(
        stub,
        lambda **_: SimpleNamespace(logits=leaf[rows]),
        {name: x[rows] for name, x in columns.items()},
        False,
    )
    logps = leaf.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    sides = ("chosen", "rejected", "third")
    split = (logps * mask[:, 1:]).sum(-1).split(B), mask[:, 1:].sum(-1).split(B)
    sums = {f"{side}_logps": x for side, x in zip(sides, split[0], strict=True)}
    sizes = {f"{side}_lengths": x for side, x in zip(sides, split[1], strict=True)}
    agree(tpo_rows(loss_type, alpha, sums, sizes).mean(), theirs, leaf)

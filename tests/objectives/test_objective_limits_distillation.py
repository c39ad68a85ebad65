"""Limits and identities of the distillation family, and TRL's own values."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.objectives import get

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**20)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "alpha_divergence", "tvd")
SYMMETRIC = ("jsd", "alpha_divergence", "tvd")
P, V, N, T = 4, 7, 3, 6


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-10, **tolerance})


def logits(seed: int, count: int = 2, spread: float = 2.0):
    g = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(count, P, V, generator=g, dtype=torch.float64)).unbind()


def tokens(seed: int):
    """(logps, teacher, old, mask) with one empty row."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(3, N, T, generator=g, dtype=torch.float64)
    mask = torch.rand(N, T, generator=g) < 0.7
    mask[0], mask[1, 0] = False, True
    return *logps.unbind(), mask


@pytest.mark.parametrize("key", DIVERGENCES)
@given(seed=seeds)
@few
def test_divergences(key, seed):
    student, teacher = logits(seed)
    divergence = get(key)
    assert (divergence(student, teacher) > 0).all()
    close(divergence(teacher, teacher + 3.0), torch.zeros(P, dtype=torch.float64))
    if key in SYMMETRIC:
        close(divergence(student, teacher), divergence(teacher, student))
    cold = divergence(student, teacher, temperature=1e6)
    close(cold, torch.zeros_like(cold), atol=1e-5)


@given(seed=seeds)
@few
def test_one_divergence_is_the_others(seed):
    student, teacher = logits(seed)
    forward, reverse = get("forward_kl"), get("reverse_kl")
    close(forward(student, teacher), reverse(teacher, student))
    close(get("jsd")(student, teacher, beta=0.0), forward(student, teacher))
    close(get("jsd")(student, teacher, beta=1.0), reverse(student, teacher))
    alpha = get("alpha_divergence")
    close(alpha(student, teacher, alpha=1 - 1e-5), forward(student, teacher), rtol=1e-3)
    close(alpha(student, teacher, alpha=1e-5), reverse(student, teacher), rtol=1e-3)
    # chi², by hand
    s, t = student.softmax(-1), teacher.softmax(-1)
    chi = ((t - s).square() / s).sum(-1) / 2
    close(alpha(student, teacher, alpha=2.0), chi)
    distance = get("tvd")(student, teacher)
    assert (distance <= 1).all()
    assert (2 * distance.square() <= forward(student, teacher)).all()  # Pinsker


@pytest.mark.parametrize("alpha", [2e-6, 1e-3, -1e-3, 0.3, 0.999, 1 - 2e-6, 1.001, 3.0])
def test_alpha_divergence_of_close_distributions(alpha):
    """Of which float32 would leave rounding, in the value and in the gradient."""
    student, teacher = logits(0)
    teacher, results = student + 0.05 * teacher, []
    for dtype in (torch.float32, torch.float64):
        x = student.to(dtype).requires_grad_()
        found = get("alpha_divergence")(x, teacher.to(dtype), alpha=alpha)
        results.append((found, *torch.autograd.grad(found.sum(), x)))
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    plain = ((alpha * t + (1 - alpha) * s).exp().sum(-1) - 1) / (alpha * (alpha - 1))
    close(results[1][0], plain, rtol=1e-6, atol=1e-9)
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("key", [*DIVERGENCES, "adpa", "aligndistil"])
def test_words_that_all_exclude(key):
    excluded = torch.tensor([3])
    few = logits(1, 3 if key in ("adpa", "aligndistil") else 2)
    student, *others = (x.index_fill(-1, excluded, -torch.inf) for x in few)
    found = get(key)(student.requires_grad_(), *others)
    (grad,) = torch.autograd.grad(found.sum(), student)
    close(found, get(key)(*(x[:, [0, 1, 2, 4, 5, 6]] for x in few)))
    assert not grad[:, 3].any() and grad.isfinite().all()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_words_that_the_teacher_excludes(tail, beta):
    """They have probability 0 there: the KL of a sampler's distribution, cut to its best words."""
    student, teacher = logits(1)
    teacher = teacher.index_fill(-1, torch.tensor([3]), -torch.inf)
    s, t = student.softmax(-1), teacher.softmax(-1)
    close(get("tvd")(student, teacher), (s - t).abs().sum(-1) / 2)
    middle = beta * t + (1 - beta) * s
    kept = (t * (t / middle).log()).nan_to_num().sum(-1)
    expected = beta * kept + (1 - beta) * (s * (s / middle).log()).sum(-1) if beta else kept
    student.requires_grad_()
    found = get("jsd", beta=beta)(student, teacher)
    close(found, expected)
    assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()
    listed = student.log_softmax(-1)[:, 2:5], teacher.log_softmax(-1)[:, 2:5]
    few = get("topk_kl", tail=tail)(*listed)
    assert torch.autograd.grad(few.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_jsd_at_its_ends_is_not_its_limit(beta):
    student, teacher = logits(0)
    assert (get("jsd")(student, teacher, beta=beta) < 1e-2).all()


@given(seed=seeds)
@few
def test_topk_of_the_whole_vocabulary(seed):
    student, teacher = (x.log_softmax(-1) for x in logits(seed))
    for direction in ("forward", "reverse"):
        whole = get(f"{direction}_kl")(student, teacher)
        topk = get("topk_kl", direction=direction)
        close(topk(student, teacher, tail=False), whole)
        close(topk(student, teacher), whole, atol=1e-4)
        # What is left out goes into one word: never more than over all words.
        assert (topk(student[:, :3], teacher[:, :3]) <= whole + 1e-9).all()
        close(topk(student[:, :6], teacher[:, :6]), whole)


@given(seed=seeds)
@few
def test_teachers(seed):
    student, teacher, other = logits(seed, 3)
    adpa, reverse = get("adpa"), get("reverse_kl")
    close(adpa(student, teacher, other), reverse(student, teacher) - reverse(student, other))
    close(adpa(student, teacher, teacher), torch.zeros(P, dtype=torch.float64))
    plain = get("aligndistil", beta=0.3)
    close(plain(student, teacher, teacher), 300 * reverse(student, teacher))
    pushed = teacher + 1e-3 * (teacher - other)
    close(plain(student, teacher, other, c=0.0), 300 * reverse(student, pushed))


@given(seed=seeds)
@few
def test_sampled_tokens(seed):
    logps, teacher, old, mask = tokens(seed)
    logps.requires_grad_()
    opd, weighted = get("opd"), get("iw_opd")
    close(weighted(logps, teacher, mask, gamma=0.0), opd(logps, teacher, mask))
    count = mask.sum()
    for given_count in (count, count.item()):
        close(opd(logps, teacher, mask, num_tokens=given_count), opd(logps, teacher, mask))
    close(opd(logps, teacher, mask, num_tokens=2 * count), opd(logps, teacher, mask) / 2)
    (gradient,) = torch.autograd.grad(opd(logps, teacher, mask).mean(), logps)
    close(gradient, ((logps - teacher) * mask / mask.sum()).detach())
    assert opd(logps, teacher, mask & False).abs().sum() == 0
    first = weighted(logps, teacher, mask, old, gamma=1.0)[1:]
    assert (first.isfinite()).all()
    same = weighted(logps, old, mask, old)
    close(same, torch.zeros_like(same))


@given(seed=seeds, beta=st.sampled_from([0.0, 0.3, 1.0]), temperature=st.floats(0.3, 3))
@few
def test_gkd_of_trl(seed, beta, temperature):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = logits(seed)
    expected = trl.GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="none"
    )
    rows = get("jsd", beta=beta)(student, teacher, temperature=temperature)
    # TRL makes a float32 tensor of beta
    close(rows, expected[0].sum(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("beta", "direction"), [(0, "forward"), (1, "reverse")])
def test_topk_of_trl(tail, beta, direction):
    trl = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    student, teacher = logits(1)
    words = (teacher if beta == 0 else student).topk(3).indices
    expected = trl.IWOPDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, reduction="none", top_k=3, add_tail=tail
    )
    chosen = [x.log_softmax(-1).gather(-1, words) for x in (student, teacher)]
    close(get("topk_kl")(*chosen, tail=tail, direction=direction), expected[0].sum(-1))


@pytest.mark.parametrize("sampled", [True, False])
def test_iw_opd_of_trl(sampled):
    trl = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    g = torch.Generator().manual_seed(0)
    student = torch.randn(N, T, V, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, V, (N, T), generator=g)
    _, teacher, old, mask = tokens(0)
    model = torch.nn.Module().eval()
    names = ("mean_advantage", "mean_abs_advantage", "mean_weight", "min_weight", "max_weight")
    metrics = {"eval": {f"iw_opd/{name}": [] for name in names}}
    stub = SimpleNamespace(
        temperature=1.0, iw_opd_gamma=0.7, iw_opd_epsilon=1e-8, model=model, _metrics=metrics
    )
    expected = trl.IWOPDTrainer._compute_iw_opd_loss(
        stub, student, ids, torch.where(mask, ids, -100), teacher, old if sampled else None
    )
    logps = student.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    loss = get("iw_opd", gamma=0.7)(logps, teacher, mask, old if sampled else None).mean()
    close(loss, expected)
    close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected)))


def test_confidence_and_emptiness():
    """A student that is certain, a top-k that holds all the mass, a row without tokens."""
    sure = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    other = torch.tensor([[-500.0, 500.0, 0.0]])
    for key in DIVERGENCES:
        rows = get(key)(sure, other)
        assert rows.isfinite().all()
        assert torch.autograd.grad(rows.sum(), sure)[0].isfinite().all()
    all_mass = torch.tensor([[0.0, -500.0]], requires_grad=True)
    rows = get("topk_kl")(all_mass, torch.tensor([[-500.0, 0.0]]))
    assert rows.isfinite().all()
    assert torch.autograd.grad(rows.sum(), all_mass)[0].isfinite().all()


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^direction: expected one of forward, reverse, got 'up'"):
        get("topk_kl", direction="up")
    with pytest.raises(ValueError, match=r"^beta: expected a number in \[0, 1\], got 1.5"):
        get("jsd")(x, x, beta=1.5)
    with pytest.raises(ValueError, match=r"^teacher_logits: expected shape \(2, 3\), got \(2, 4\)"):
        get("tvd")(x, torch.zeros(2, 4))

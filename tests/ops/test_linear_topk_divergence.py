"""`linear_topk_divergence`: a teacher that is stored as its best words."""

from __future__ import annotations

import pytest
import torch
from _pair_problem import sides

import fastpo
from fastpo import objectives, planner
from fastpo.ops.rows import registry
from fastpo.testing import assert_as_good_as_eager


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in both directions."""
    monkeypatch.setattr(planner, "tile_shape", lambda tokens, vocab, kind: planner.Tiles(5, 64))


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_stored_as_its_best_words(kind, tail):
    h, w, b, th, tw, _ = sides()
    best = torch.topk((th @ tw.t()).log_softmax(-1), 7, dim=-1)
    options = {"temperature": 0.8, "softcap": 6.0}
    found = fastpo.linear_topk_divergence(
        h, w, best.indices, best.values, kind=kind, tail=tail, bias=b, **options
    )
    hd, wd, bd = (x.detach().double().requires_grad_() for x in (h, w, b))
    z = 6.0 * torch.tanh((hd @ wd.t() + bd) / 6.0) / 0.8
    student = z.log_softmax(-1).gather(-1, best.indices)
    expected = best_words(student, best.values.detach().double(), kind, tail)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.linspace(-1, 1, 13)
    ours = torch.autograd.grad((found * upstream).sum(), [h, w, b])
    theirs = torch.autograd.grad((expected * upstream).sum(), [hd, wd, bd])
    for mine, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), own, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (12,), ()])
@pytest.mark.parametrize("k", [1, 7])
def test_tokens_of_any_shape(k, shape):
    """A list of one word, too."""
    h, w, _, th, tw, _ = (x.detach() for x in sides())
    best = torch.topk((th @ tw.t()).log_softmax(-1), k, dim=-1)
    n = torch.Size(shape).numel()
    given, ids, logps = (x[:n].view(*shape, -1) for x in (h, best.indices, best.values))
    mask, upstream = (torch.arange(n) % 3 < 2).view(shape), torch.linspace(-1, 2, n).view(shape)
    results = []
    for dtype in (torch.float32, torch.float64):
        hd, wd = (x.to(dtype, copy=True).requires_grad_() for x in (given, w))
        if dtype == torch.float32:
            found = fastpo.linear_topk_divergence(hd, wd, ids, logps, kind="jsd", mask=mask)
        else:
            student = (hd @ wd.t()).log_softmax(-1).gather(-1, ids)
            found = best_words(student, logps.double(), "jsd", True) * mask
        results.append([found, *torch.autograd.grad((found * upstream).sum(), [hd, wd])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-5)


def test_no_tokens():
    h, w, *_ = sides()
    nobody = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)
    found = fastpo.linear_topk_divergence(h[:0], w, *nobody, kind="forward_kl")
    assert found.shape == (0,) and not torch.autograd.grad(found.sum(), w)[0].any()


def best_words(student, teacher, kind, tail):
    if kind != "jsd":
        direction = kind.removesuffix("_kl")
        return objectives.get("topk_kl", direction=direction, tail=tail)(student, teacher)

    def whole(x):
        if not tail:
            return x.log_softmax(-1)
        return torch.cat((x, torch.log1p(-x.exp().sum(-1, keepdim=True))), -1)

    s, t = whole(student), whole(teacher)
    m = (0.5 * s.exp() + 0.5 * t.exp()).log()
    return (0.5 * t.exp() * (t - m) + 0.5 * s.exp() * (s - m)).sum(-1)


def test_best_words_with_a_mask():
    h, w, _, th, tw, _ = sides()
    best = torch.topk((th @ tw.t()).log_softmax(-1), 7, dim=-1)
    mask = torch.arange(13) > 4
    found = fastpo.linear_topk_divergence(
        h, w, best.indices, best.values, kind="forward_kl", mask=mask
    )
    assert not found[:5].any() and found[5:].all()
    assert not torch.autograd.grad(found.sum(), h)[0][:5].any()


def test_masked_rows_may_hold_anything_beside_a_list():
    h, w, _, th, tw, _ = sides()
    best = torch.topk((th @ tw.t()).log_softmax(-1), 7, dim=-1)
    mask = torch.arange(13) > 4
    h, listed = (x.detach().clone() for x in (h, best.values))
    h[:5], listed[:5] = float("nan"), float("nan")
    found = fastpo.linear_topk_divergence(
        h.requires_grad_(), w, best.indices, listed, kind="forward_kl", mask=mask
    )
    dh, dw = torch.autograd.grad(found.sum(), [h, w])
    assert not found[:5].any() and not dh[:5].any()
    assert dh.isfinite().all() and dw.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_words_of_a_list_are_multiplied_in_float32_inside_autocast(backend, monkeypatch):
    if registry.unavailable(backend, torch.device("cpu")) is not None:
        pytest.skip("not built")
    monkeypatch.setattr(registry, "choose", lambda *_: backend)
    h, w, _, th, tw, _ = (x.detach() for x in sides())
    best = torch.topk((th @ tw.t()).log_softmax(-1), 7, dim=-1)
    given = (h, w, best.indices, best.values)
    expected = fastpo.linear_topk_divergence(*given, kind="jsd")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastpo.linear_topk_divergence(*given, kind="jsd"), expected)


def test_what_a_list_leaves_out_of_a_peaked_student():
    """p is so near 1 that logits of a hundred, rounded, hide 1 - p."""
    h, w, b, th, tw, _ = sides()
    h = (h * 8).detach().requires_grad_()
    best = torch.topk((th @ tw.t()).log_softmax(-1), 3, dim=-1)
    ids, listed = best.indices.clone(), best.values.detach()
    ids[:, 0] = (h @ w.t() + b).argmax(-1)
    results = []
    for dtype in (None, torch.float32, torch.float64):
        hd, wd, bd = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (h, w, b))
        if dtype is None:
            found = fastpo.linear_topk_divergence(hd, wd, ids, listed, kind="forward_kl", bias=bd)
        else:
            student = (hd @ wd.t() + bd).log_softmax(-1).gather(-1, ids)
            teacher = listed.to(dtype)
            rest = [x.logsumexp(-1).clamp_max(-1e-6) for x in (student, teacher)]
            s, t = (torch.log(-torch.expm1(x)) for x in rest)
            found = (teacher.exp() * (teacher - student)).sum(-1) + t.exp() * (t - s)
        grads = torch.autograd.grad(found.sum(), [hd, wd, bd])
        results.append([found, *grads])
    assert (results[-1][0] > 10).any()
    for name, fused, eager, truth in zip(("value", "dh", "dw", "db"), *results, strict=True):
        assert_as_good_as_eager(name, fused, eager, truth)


@pytest.mark.parametrize(
    ("kind", "own", "teachers"),
    [("forward_kl", [5], [4, 5]), ("reverse_kl", [3, 5], [5]), ("jsd", [3, 5], [4, 5])],
)
def test_words_that_a_side_excludes(kind, own, teachers):
    """All words in a list: the same as of two heads, whose biases exclude them."""
    h, w, _, th, tw, _ = (x.detach() for x in sides())
    bias, teacher_bias = torch.zeros(2, len(w))
    bias[own] = teacher_bias[teachers] = float("-inf")
    ids = torch.arange(len(w)).expand(13, -1)
    listed = (th @ tw.t() + teacher_bias).log_softmax(-1)
    results = []
    for whole in (False, True):
        student = [x.clone().requires_grad_() for x in (h, w)]
        if whole:
            found = fastpo.linear_divergence(
                *student, th, tw, kind=kind, bias=bias, teacher_bias=teacher_bias
            ).divergence
        else:
            found = fastpo.linear_topk_divergence(*student, ids, listed, kind=kind, bias=bias)
        results.append((found, *torch.autograd.grad(found.sum(), student)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("filler", [(2, 3, 4), (1, 1, 0), None])
def test_short_lists_are_filled_up(filler, kind, tail):
    """By any words, those of the list and the student's best, too."""
    h, w, *_ = (x.detach() for x in sides())
    ids, logps = torch.arange(5).repeat(13, 1), torch.tensor([-0.2, -2.0]).expand(13, 2)
    best = (h @ w.t()).topk(3).indices
    ids[:, 2:] = best if filler is None else torch.tensor(filler)
    results = []
    for k in (2, 5):
        filled = torch.cat((logps, torch.full((13, k - 2), -torch.inf)), 1)
        student = [x.clone().requires_grad_() for x in (h, w)]
        found = fastpo.linear_topk_divergence(*student, ids[:, :k], filled, kind=kind, tail=tail)
        results.append((found, *torch.autograd.grad(found.sum(), student)))
    for short, full in zip(*results, strict=True):
        torch.testing.assert_close(full, short, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", [True, False])
def test_a_list_without_words_is_nothing(tail):
    h, w, *_ = sides()
    logps = torch.full((13, 2), -2.0).index_fill(0, torch.tensor([3]), -torch.inf)
    ids = torch.arange(2).expand(13, 2)
    found = fastpo.linear_topk_divergence(h, w, ids, logps, kind="reverse_kl", tail=tail)
    assert found[3] == 0 and found[2] > 0
    gradient, *_ = torch.autograd.grad(found.sum(), (h, w))
    assert gradient.isfinite().all() and not gradient[3].any() and gradient[2].any()


def test_a_filled_list_beside_a_mask():
    h, w, *_ = (x.detach() for x in sides())
    ids, logps = torch.arange(5).expand(13, 5), torch.tensor([-0.2, -2.0]).expand(13, 2)
    filled = torch.cat((logps, torch.full((13, 3), float("-inf"))), 1)
    ids = ids.index_fill(1, torch.tensor([2, 3, 4]), -100)
    mask = torch.arange(13) > 4
    with pytest.raises(ValueError, match=r"teacher_ids: expected values in \[0, 211\)"):
        fastpo.linear_topk_divergence(h, w, ids, filled, kind="forward_kl", mask=mask)
    ids = torch.where(mask.unsqueeze(1), 7, ids)
    assert fastpo.linear_topk_divergence(h, w, ids, filled, kind="jsd", mask=mask)[5:].all()


LISTS = [
    ({"kind": "tvd"}, r"kind: expected forward_kl, reverse_kl or jsd, got 'tvd'"),
    ({"teacher_ids": torch.zeros(13, 3)}, r"teacher_ids: expected int64 of shape \(13, K\)"),
    ({"teacher_ids": torch.zeros(13, 0).long()}, r"teacher_ids: expected .* got .* \(13, 0\)"),
    ({"teacher_logps": torch.zeros(13, 2)}, r"teacher_logps: expected shape \(13, 3\)"),
    ({"teacher_ids": torch.full((13, 3), 211)}, r"teacher_ids: expected values in \[0, 211\)"),
]


@pytest.mark.parametrize(("change", "message"), LISTS)
def test_lists_that_cannot_be_raise(change, message):
    h, w, *_ = (x.detach() for x in sides())
    ids, logps = torch.zeros(13, 3, dtype=torch.int64), torch.full((13, 3), -2.0)
    given = {"teacher_ids": ids, "teacher_logps": logps, "kind": "forward_kl"}
    with pytest.raises(ValueError, match=message):
        fastpo.linear_topk_divergence(h, w, **{**given, **change})

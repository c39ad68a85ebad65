"""`linear_topk_divergence`: a teacher that is stored as its best words."""

from __future__ import annotations

import importlib

import pytest
import torch
from _pair_problem import sides

import fastpo
from fastpo import objectives, planner
from fastpo.ops.rows import registry
from fastpo.testing import assert_as_good_as_eager

topk_divergence = importlib.import_module("fastpo.ops.linear_topk_divergence")


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
    # However they lie: PyTorch copies no number to make them dense.
    apart = torch.zeros(0, 24, 2)[..., 1].requires_grad_()
    found = fastpo.linear_topk_divergence(apart, w, *nobody, kind="jsd")
    assert torch.autograd.grad(found.sum(), apart)[0].shape == (0, 24)


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


def with_all_others(logps, ids):
    """Log-probabilities of a list, and of all words that are not in it: no 1 - p."""
    others = logps.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((logps.gather(-1, ids), others), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("on_list", [0.0, 8.0, 16.0, 40.0])
def test_what_a_list_leaves_out_of_a_peaked_student(on_list, frozen, dtype):
    """Of one word or of all listed ones, p is so near 1 that 1 - p in float32 is anything."""
    h, w, b, th, tw, _ = (x.detach() for x in sides())
    best = torch.topk((th @ tw.t()).log_softmax(-1), 3, dim=-1)
    ids, listed = best.indices.clone(), best.values
    ids[:, 0] = (5 * h @ w.t() + b).argmax(-1)
    ids[:] = ids[:1] if on_list else ids
    h, b = 5 * h, b.index_add(0, ids[0], torch.full((3,), on_list))
    results = []
    for own in (None, torch.float32, torch.float64):
        # Eager begins with the numbers that the call is given.
        leaves = [x.to(dtype).to(own or dtype, copy=True) for x in (h, w)] + [b.to(own or b.dtype)]
        hd, wd, bd = (x.requires_grad_(not frozen or i == 0) for i, x in enumerate(leaves))
        if own is None:
            found = fastpo.linear_topk_divergence(hd, wd, ids, listed, kind="forward_kl", bias=bd)
        else:
            student = with_all_others((hd @ wd.t() + bd).log_softmax(-1), ids)
            teacher = listed.double()
            teacher = torch.cat((teacher, torch.log1p(-teacher.exp().sum(-1, keepdim=True))), -1)
            found = (teacher.exp() * (teacher - student.double())).sum(-1)
        grads = torch.autograd.grad(found.sum(), [hd] if frozen else [hd, wd, bd])
        results.append([found, *(x.to(dtype) if own == torch.float32 else x for x in grads)])
    assert (results[-1][0] > 10).any()
    for name, fused, eager, truth in zip(("value", "dh", "dw", "db"), *results, strict=False):
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
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


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


def test_a_token_has_the_same_bits_beside_any_others():
    h, w, b, th, tw, _ = (x.detach() for x in sides())
    best = torch.topk((th @ tw.t()).log_softmax(-1), 5, dim=-1)

    def numbers(rows):
        own = h[rows].clone().requires_grad_()
        given = own, w, best.indices[rows], best.values[rows]
        found = fastpo.linear_topk_divergence(*given, kind="jsd", bias=b)
        return found.detach(), torch.autograd.grad(found.sum(), own)[0]

    values, gradients = numbers(slice(None))
    for n in range(1, 13):
        for rows in (slice(0, n), slice(n, None)):
            own, gradient = numbers(rows)
            assert torch.equal(own, values[rows])
            # A library's product of few rows may round otherwise.
            torch.testing.assert_close(gradient, gradients[rows])


EXCLUDED = torch.zeros(211).index_fill(0, torch.tensor([0]), -torch.inf)
EMPTY = torch.tensor([[-0.5, -2.0], [-torch.inf, -torch.inf]])
IDS = torch.tensor([[1, 2], [0, 3]])
# Bias, logps, mask and hidden state of a second row that counts for nothing.
NOTHING = {
    "masked, a word excluded": (EXCLUDED, EMPTY[[0, 0]], [True, False], 1.0),
    "masked, not a number": (None, EMPTY[[0, 0]], [True, False], float("nan")),
    "empty, a filler excluded": (EXCLUDED, EMPTY, None, 1.0),
    "empty, fillers far apart": (torch.arange(211) * 100.0, EMPTY, None, 1.0),
    "empty, not a number": (None, EMPTY, None, float("nan")),
    "empty, not masked": (None, EMPTY, [True, True], float("nan")),
}


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("case", NOTHING)
def test_a_row_that_gives_nothing_is_as_if_it_were_not_there(case, kind, tail):
    bias, logps, mask, scale = NOTHING[case]
    mask = None if mask is None else torch.tensor(mask)
    h, w, *_ = (x.detach() for x in sides())
    results = []
    for rows in (2, 1):
        own = h[:rows] * torch.tensor([[1.0], [scale]])[:rows], w.clone()
        leaves = [x.requires_grad_() for x in own]
        given = {"kind": kind, "tail": tail, "mask": None if mask is None else mask[:rows]}
        found = fastpo.linear_topk_divergence(*leaves, IDS[:rows], logps[:rows], bias=bias, **given)
        dh, dw = torch.autograd.grad(found.sum(), leaves)
        assert not found[1:].any() and not dh[1:].any()
        results.append((found[0], dh[0], dw))
    for both, alone in zip(*results, strict=True):
        torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_has_no_word_of_a_list(kind, frozen, tail):
    """All it has is the rest, or nothing: that is a number, and moves no weight."""
    h, w, *_ = (x.detach() for x in sides())
    ids = torch.tensor([[0, 1, 2], [5, 6, 7]]).repeat_interleave(torch.tensor([1, 12]), 0)
    listed = torch.tensor([-1.0, -1.5, -2.0]).expand(13, 3)
    bias, results = torch.zeros(211).index_fill(0, ids[0], -torch.inf), []
    for rows in (slice(None), slice(1, None)):
        leaves = [x.clone().requires_grad_() for x in (h[rows], w)]
        head = leaves[1].detach() if frozen else leaves[1]
        given = {"kind": kind, "bias": bias, "tail": tail}
        found = fastpo.linear_topk_divergence(leaves[0], head, ids[rows], listed[rows], **given)
        grads = torch.autograd.grad(found.sum(), leaves[:1] if frozen else leaves)
        results.append((found[-12:], grads[0][-12:], *grads[1:]))
        if rows == slice(None):
            assert not grads[0][0].any()
            expected = beside_nothing(listed[0].double().exp(), kind, tail)
            torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)
    for ours, alone in zip(*results, strict=True):
        torch.testing.assert_close(ours, alone)


def beside_nothing(q, kind, tail):
    """The divergence from q to a student whose words of the list have no probability."""
    share = q.sum() if tail else torch.ones_like(q.sum())
    if kind == "forward_kl":
        return 1e30 * share
    rest = 1 - share
    if kind == "reverse_kl":
        return -rest.log() if tail else rest
    beside = rest * (rest / (0.5 + 0.5 * rest)).log() - (0.5 + 0.5 * rest).log() if tail else rest
    return 0.5 * (share * torch.tensor(2.0).log() + beside)


def test_a_list_of_all_the_mass_says_nothing_of_the_rest():
    """A student with less than what rounding leaves of it pays nothing, and is not moved."""
    h, w = torch.ones(1, 1, requires_grad=True), torch.tensor([[15.2], [0.0], [0.0]])
    logps = torch.zeros(1, 1, requires_grad=True)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    found = fastpo.linear_topk_divergence(h, w, ids, logps, kind="forward_kl")
    moved, teachers = torch.autograd.grad(found.sum(), (h, logps), allow_unused=True)
    assert teachers is None and found.item() < 1e-6 and moved.abs().item() < 1e-9


def test_a_filled_list_beside_a_mask():
    h, w, *_ = (x.detach() for x in sides())
    ids, logps = torch.arange(5).expand(13, 5), torch.tensor([-0.2, -2.0]).expand(13, 2)
    filled = torch.cat((logps, torch.full((13, 3), float("-inf"))), 1)
    ids = ids.index_fill(1, torch.tensor([2, 3, 4]), -100)
    mask = torch.arange(13) > 4
    with pytest.raises(ValueError, match=r"teacher_ids: expected values in \[0, 211\)"):
        fastpo.linear_topk_divergence(h, w, ids, filled, kind="forward_kl", mask=mask)
    ids = torch.where(mask.unsqueeze(1), torch.arange(7, 12), ids)
    assert fastpo.linear_topk_divergence(h, w, ids, filled, kind="jsd", mask=mask)[5:].all()


LOWER = torch.tensor([-1.0, -2.0, 0.5])

LISTS = [
    ({"kind": "tvd"}, r"kind: expected forward_kl, reverse_kl or jsd, got 'tvd'"),
    ({"teacher_ids": torch.zeros(13, 3)}, r"teacher_ids: expected int64 of shape \(13, K\)"),
    ({"teacher_ids": torch.zeros(13, 0).long()}, r"teacher_ids: expected .* got .* \(13, 0\)"),
    ({"teacher_logps": torch.zeros(13, 2)}, r"teacher_logps: expected shape \(13, 3\)"),
    ({"teacher_ids": torch.full((13, 3), 211)}, r"teacher_ids: expected values in \[0, 211\)"),
    (
        {"teacher_ids": torch.tensor([[4, 9, 2]] * 5 + [[7, 3, 7]] * 8)},
        r"teacher_ids: expected each word once for a token, got 7 twice at \(5,\)",
    ),
    (
        {"teacher_ids": torch.zeros(13, 3, dtype=torch.int64, device="meta")},
        "teacher_ids: expected device cpu, got meta",
    ),
    *(
        ({"teacher_logps": logps}, f"teacher_logps: expected {expected}")
        for logps, expected in (
            (torch.ones(13, 3, dtype=torch.bool), "a floating dtype, got torch.bool"),
            (torch.full((13, 3), -1), "a floating dtype, got torch.int64"),
            (torch.zeros(13, 3, dtype=torch.complex64), "a floating dtype, got torch.complex64"),
            (torch.zeros(13, 3, device="meta"), "device cpu, got meta"),
            (LOWER.expand(13, 3), r"logarithms .*, at most 0, got 0.5 at \(0, 2\)"),
            (LOWER.log().expand(13, 3), r"logarithms .*, at most 0, got nan at \(0, 0\)"),
        )
    ),
    ({"tail": False, "backend": "mps"}, "backend: expected one of cuda, .*, got 'mps'"),
]


@pytest.mark.parametrize(("change", "message"), LISTS)
def test_lists_that_cannot_be_raise(change, message):
    h, w, *_ = (x.detach() for x in sides())
    ids, logps = torch.arange(3).expand(13, 3), torch.full((13, 3), -2.0)
    given = {"teacher_ids": ids, "teacher_logps": logps, "kind": "forward_kl"}
    with pytest.raises(ValueError, match=message):
        fastpo.linear_topk_divergence(h, w, **{**given, **change})


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_list_that_nobody_waits_for(kind, monkeypatch):
    """As on a GPU: a token whose list is none is NaN, and so is its gradient."""
    monkeypatch.setattr(topk_divergence, "_raise_first", lambda *_: None)
    h, w, *_ = (x.detach() for x in sides())
    ids = torch.tensor([4, 9, 2]).repeat(13, 1)
    logps = torch.tensor([-1.0, -2.0, -3.0]).repeat(13, 1)
    right = fastpo.linear_topk_divergence(h, w, ids, logps, kind=kind)
    ids[1], logps[2, 1], logps[3, 0] = torch.tensor([7, 3, 7]), torch.nan, 0.6
    ids[4, 1], ids[5, 2] = -1, 2**40
    found = fastpo.linear_topk_divergence(h.requires_grad_(), w, ids, logps, kind=kind)
    assert found.isnan().nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    assert found[6:].equal(right[6:])
    moved = torch.autograd.grad(found.sum(), h)[0]
    assert moved.isnan().all(-1).nonzero().flatten().tolist() == [1, 2, 3, 4, 5]

"""`linear_divergence` against its slow twin in float64, and what it does at the edges."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from _pair_problem import sides
from _probes import COMPARING, Products, Widest
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpo
from fastpo import objectives, planner, reference
from fastpo.testing import assert_as_good_as_eager

KINDS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "alpha": {"alpha": 0.4},
    "alpha_beyond": {"alpha": 1.3},
    "tvd": {},
}
MAPS = {
    "plain": {},
    "mapped": {
        "temperature": 0.8,
        "teacher_temperature": 1.3,
        "softcap": 6.0,
        "logit_scale": 1.4,
        "teacher_softcap": 9.0,
        "teacher_logit_scale": 0.7,
    },
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in both directions."""
    monkeypatch.setattr(planner, "tile_shape", lambda tokens, vocab, kind: planner.Tiles(5, 64))


def run(function, tensors, upstream, **options):
    h, w, b, th, tw, tb = tensors
    stats = function(h, w, th, tw, bias=b, teacher_bias=tb, **options)
    grads = torch.autograd.grad((stats.divergence * upstream.to(h.dtype)).sum(), tensors)
    names = ("dhidden", "dweight", "dbias", "dteacher_hidden", "dteacher_weight", "dteacher_bias")
    named = dict(zip(names, grads, strict=True))
    return {"divergence": stats.divergence, "entropy": stats.entropy, **named}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapped", MAPS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("backend", [None, "torch"])
def test_as_good_as_eager(backend, name, mapped, dtype):
    options = {"kind": name.removesuffix("_beyond"), **KINDS[name], **MAPS[mapped]}
    tensors = sides(dtype=dtype)
    upstream = torch.linspace(-1, 1, len(tensors[0]))
    both = ("divergence", "entropy")
    ours = {"teacher_grad": True, "outputs": both, "backend": backend}
    fused = run(fastpo.linear_divergence, tensors, upstream, **ours, **options)
    eager = run(reference.linear_divergence, tensors, upstream, **options)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = run(reference.linear_divergence, wide, upstream, **options)
    for key in truth:
        # One draw of a small problem: eager is sometimes lucky, and rounds other cells.
        assert_as_good_as_eager(key, fused[key], eager[key], truth[key], factor=4.0)


@pytest.mark.parametrize("name", KINDS)
def test_the_catalogue_s_definition(name):
    key = {"alpha": "alpha_divergence"}.get(name.removesuffix("_beyond"), name)
    h, w, b, th, tw, tb = (x.detach() for x in sides())
    options = KINDS[name]
    expected = objectives.get(key, **options)((h @ w.t() + b).double(), (th @ tw.t() + tb).double())
    kind = name.removesuffix("_beyond")
    found = fastpo.linear_divergence(
        h, w, th, tw, kind=kind, bias=b, teacher_bias=tb, **options
    ).divergence
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [("jsd", "beta", 0.0, 1.0), ("alpha", "alpha", 1.0, 0.0)])
def test_limits_are_the_two_kls(limit):
    kind, name, forward, reverse = limit
    h, w, _, th, tw, _ = sides()
    for value, key in ((forward, "forward_kl"), (reverse, "reverse_kl")):
        found = fastpo.linear_divergence(h, w, th, tw, kind=kind, **{name: value}).divergence
        expected = fastpo.linear_divergence(h, w, th, tw, kind=key).divergence
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", KINDS)
def test_of_itself_is_nothing(name):
    h, w, b, *_ = sides()
    kind = name.removesuffix("_beyond")
    found = fastpo.linear_divergence(
        h, w, h.detach(), w.detach(), kind=kind, bias=b, teacher_bias=b, **KINDS[name]
    ).divergence
    grads = torch.autograd.grad(found.sum(), [h, w])
    assert found.abs().max() < 1e-5
    assert all(g.abs().max() < 1e-4 for g in grads)


@pytest.mark.parametrize("name", KINDS)
def test_neither_is_negative(name):
    """As the rounding of nearly nothing would be."""
    h, w, *_ = (x.detach() for x in sides(tokens=64))
    kind, outputs = name.removesuffix("_beyond"), ("divergence", "entropy")
    near = (20 * h, w, 20.0001 * h, w)
    found = fastpo.linear_divergence(*near, kind=kind, outputs=outputs, **KINDS[name])
    assert all(x.min() >= 0 for x in found)


@pytest.mark.parametrize("alpha", [0.01, -1e-4, 2e-6, 0.99, 1.0001, 1 - 2e-6])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_an_alpha_near_its_limits(backend, alpha):
    """Nothing is divided by alpha·(1 - alpha) that float32 has rounded."""
    tensors = sides()
    upstream = torch.linspace(-1, 1, len(tensors[0]))
    options = {"kind": "alpha", "alpha": alpha}
    ours = {"teacher_grad": True, "outputs": ("divergence", "entropy"), "backend": backend}
    fused = run(fastpo.linear_divergence, tensors, upstream, **ours, **options)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = run(reference.linear_divergence, wide, upstream, **options)
    for key, expected in truth.items():
        assert (fused[key] - expected).norm() < 3e-6 * expected.norm(), key


@pytest.mark.parametrize("alpha", [1.5, -0.4, 1000.0])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_an_alpha_divergence_ends_at_the_cap(backend, alpha):
    """Where the heads are so far apart that e^40 stands for more, nothing moves them."""
    apart = torch.tensor([[0.0], [-200.0]])
    h, w = torch.ones(2, 1, requires_grad=True), apart.clone().requires_grad_()
    found = fastpo.linear_divergence(
        h, w, torch.ones(2, 1), apart.flip(0), kind="alpha", alpha=alpha, backend=backend
    ).divergence
    expected = torch.tensor(40.0).expm1() / (alpha * (alpha - 1))
    torch.testing.assert_close(found, expected.expand(2), rtol=1e-4, atol=0)
    assert not any(grad.any() for grad in torch.autograd.grad(found.sum(), [h, w]))


def test_only_the_student_is_trained_unless_asked():
    h, w, b, th, tw, tb = sides()
    found = fastpo.linear_divergence(h, w, th, tw, kind="jsd", bias=b, teacher_bias=tb)
    found.divergence.sum().backward()
    assert h.grad is not None and w.grad is not None and b.grad is not None
    assert th.grad is None and tw.grad is None and tb.grad is None


@pytest.mark.parametrize("name", KINDS)
def test_a_mask_leaves_tokens_out(name):
    h, w, _, th, tw, _ = sides()
    mask = torch.arange(13) % 3 > 0
    options = {"kind": name.removesuffix("_beyond"), **KINDS[name]}
    masked = fastpo.linear_divergence(h, w, th, tw, mask=mask, **options).divergence
    whole = fastpo.linear_divergence(h[mask], w, th[mask], tw, **options).divergence
    assert torch.equal(masked[mask], whole)
    assert torch.equal(masked[~mask], torch.zeros(int((~mask).sum())))
    grad = torch.autograd.grad(masked.sum(), h)[0]
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    nothing = fastpo.linear_divergence(h, w, th, tw, mask=mask & False, **options).divergence
    dh, dw = torch.autograd.grad(nothing.sum(), [h, w])
    assert not nothing.any() and not dh.any() and not dw.any()


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), ()])
def test_shapes(shape):
    w, tw = torch.randn(70, 8), torch.randn(70, 12)
    h, th = torch.randn(*shape, 8, requires_grad=True), torch.randn(*shape, 12)
    found = fastpo.linear_divergence(h, w, th, tw, kind="jsd", outputs=("divergence", "entropy"))
    assert found.divergence.shape == found.entropy.shape == shape
    assert torch.autograd.grad(found.divergence.sum(), h)[0].shape == h.shape


@pytest.mark.parametrize("name", KINDS)
def test_a_broken_row_stays_alone(name):
    h, w, _, th, tw, _ = (x.detach() for x in sides())
    options = {"kind": name.removesuffix("_beyond"), **KINDS[name]}
    whole = fastpo.linear_divergence(h, w, th, tw, **options).divergence
    h[2], th[4] = float("nan"), float("inf")
    found = fastpo.linear_divergence(h, w, th, tw, **options).divergence
    assert found[[2, 4]].isnan().all()
    rest = torch.ones(13, dtype=torch.bool)
    rest[[2, 4]] = False
    assert torch.equal(found[rest], whole[rest])


@pytest.mark.parametrize("name", KINDS)
def test_words_both_exclude_and_far_apart_heads(name):
    h, w, b, th, tw, tb = (x.detach() for x in sides())
    b[:70], tb[:70] = float("-inf"), float("-inf")  # a whole tile
    h = (h * 30).requires_grad_()
    options = {"kind": name.removesuffix("_beyond"), **KINDS[name]}
    found = fastpo.linear_divergence(h, w, th, tw, bias=b, teacher_bias=tb, **options).divergence
    expected = fastpo.linear_divergence(
        h, w[70:], th, tw[70:], bias=b[70:], teacher_bias=tb[70:], **options
    ).divergence
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), h)[0].isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_the_twin_leaves_out_words_both_exclude(name):
    h, w, b, th, tw, tb = (x.detach().double() for x in sides())
    b[:70], tb[:70] = float("-inf"), float("-inf")
    options = {"kind": name.removesuffix("_beyond"), **KINDS[name]}
    whole, few = (
        reference.linear_divergence(
            h.requires_grad_(), w[k:], th, tw[k:], bias=b[k:], teacher_bias=tb[k:], **options
        )
        for k in (0, 70)
    )
    torch.testing.assert_close(whole, few)
    gradients = [torch.autograd.grad(x.divergence.sum(), h)[0] for x in (whole, few)]
    torch.testing.assert_close(*gradients)


def test_no_tensor_is_as_wide_as_the_logits():
    h, w, b, th, tw, tb = sides(tokens=200, vocab=1000)
    with Widest() as widest:
        found = fastpo.linear_divergence(
            h, w, th, tw, kind="jsd", bias=b, teacher_bias=tb, budget=0
        )
        found.divergence.sum().backward()
    assert widest.elements <= w.numel() + 1000 * 16 < 200 * 1000


# kept: tokens of 48, None: 16 by the planner's budget. The others are multiplied again: in the
# backward, whose own two products are d hidden and d weight, and in a second walk, which a KL has
# not.
@pytest.mark.parametrize("kept", [48, 0, 16, None])
@pytest.mark.parametrize("name", KINDS)
def test_the_budget_changes_products_and_nothing_else(name, kept, monkeypatch, library_products):
    # Whole blocks of rows: of fewer, zeros would be multiplied, too.
    monkeypatch.setattr(planner, "tile_shape", lambda tokens, vocab, kind: planner.Tiles(16, 64))
    h, w, _, th, tw, _ = sides(tokens=48)
    options = {"kind": name.removesuffix("_beyond"), **KINDS[name]}
    # Both heads have 24 columns here, so that a product is a product.
    th, tw = th[:, :24].detach(), tw[:, :24].detach()
    expected = fastpo.linear_divergence(h, w, th, tw, budget=2**40, **options).divergence
    grads = torch.autograd.grad(expected.sum(), [h, w])
    product = 48 * 211 * 24
    row = 8 * planner.kept_cells(211, 64)
    monkeypatch.setattr(planner, "default_budget", lambda *_: 16 * row)
    budget, kept = (None, 16) if kept is None else (kept * row, kept)
    with Products() as forward:
        found = fastpo.linear_divergence(h, w, th, tw, budget=budget, **options).divergence
    with Products() as backward:
        others = torch.autograd.grad(found.sum(), [h, w])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for own, other in zip(grads, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    first, second = 2, 2 + 2 * (48 - kept) / 48
    first += 0 if "kl" in name else 2 * (48 - kept) / 48
    assert forward.count == pytest.approx(first * product)
    assert backward.count == pytest.approx(second * product)


def test_without_a_gradient_nothing_is_kept():
    h, w, _, th, tw, _ = sides(tokens=200, vocab=1000)
    with torch.no_grad(), Widest() as widest:
        fastpo.linear_divergence(h, w, th, tw, kind="forward_kl", budget=2**40)
    assert widest.elements < 200 * 1000


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_student_close_to_its_teacher(kind):
    """One walk finds a divergence of 1e-5 nats among logits of 30, as well as two would."""
    h, w, b, *_ = (x.detach() for x in sides(tokens=64))
    h = h * 4
    th = h + 1e-3 * torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    both = (h, w, th, w)
    found = fastpo.linear_divergence(*both, kind=kind, bias=b, teacher_bias=b).divergence
    eager = reference.linear_divergence(*both, kind=kind, bias=b, teacher_bias=b).divergence
    wide = [x.double() for x in both]
    truth = reference.linear_divergence(
        *wide, kind=kind, bias=b.double(), teacher_bias=b.double()
    ).divergence
    assert_as_good_as_eager(kind, found, eager, truth)


def test_the_backward_may_run_twice():
    h, w, _, th, tw, _ = sides()
    found = fastpo.linear_divergence(h, w, th, tw, kind="jsd", budget=2**40).divergence.sum()
    once = torch.autograd.grad(found, [h, w], retain_graph=True)
    again = torch.autograd.grad(found, [h, w])
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


ERRORS = [
    ({"budget": -1}, r"budget: expected bytes >= 0 or None, got -1"),
    ({"kind": "kl"}, r"kind: expected one of forward_kl, .*, tvd, got 'kl'"),
    ({"beta": 1.5}, r"beta: expected a number in \[0, 1\], got 1.5"),
    ({"alpha": float("nan")}, r"alpha: expected a finite number, got nan"),
    ({"temperature": 0.0}, r"temperature: expected a finite number > 0, got 0"),
    ({"teacher_softcap": -1.0}, r"softcap: expected a finite number > 0 or None"),
    ({"outputs": ("lse",)}, r"outputs: expected a tuple of divergence, entropy"),
    ({"mask": torch.ones(13)}, r"mask: expected bool of shape \(13,\), got torch.float32"),
    ({"teacher_hidden": torch.zeros(12, 40)}, r"^teacher_hidden: .* \(13, 40\), got \(12, 40\)"),
    ({"teacher_hidden": torch.zeros(13, 40).double()}, r"^teacher_hidden: expected dtype float32"),
    ({"teacher_weight": torch.zeros(211, 3)}, r"^teacher_weight: expected shape \(V, 40\), got"),
    ({"teacher_bias": torch.zeros(3)}, r"^teacher_bias: expected shape \(211,\), got \(3,\)"),
    (
        {"teacher_hidden": torch.zeros(13, 40, device="meta")},
        "^teacher_weight: expected device meta, got cpu",
    ),
    ({"teacher_weight": torch.zeros(210, 40)}, r"teacher_weight: expected 211 words.* got 210"),
    ({"weight": torch.zeros(211, 23)}, r"weight: expected shape \(V, 24\), got \(211, 23\)"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_what_cannot_be_raises(change, message):
    h, w, _, th, tw, _ = (x.detach() for x in sides())
    given = {"hidden": h, "weight": w, "teacher_hidden": th, "teacher_weight": tw, "kind": "jsd"}
    with pytest.raises(ValueError, match=message):
        fastpo.linear_divergence(**{**given, **change})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_compiles_into_one_graph(kind, masked):
    """Columns of the student's head are far apart where there is a mask."""
    mask = torch.arange(13) % 3 > 0 if masked else None

    def loss(h, w, th, tw):
        options = {"kind": kind, "mask": mask, "outputs": ("divergence", "entropy")}
        found = fastpo.linear_divergence(h * 2, w, th, tw, **options)
        return (found.divergence * 0.5 - found.entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=COMPARING)):
        h, w, _, th, tw, _ = sides()
        w = (w.t().contiguous().t() if masked else w).detach().requires_grad_()
        value = function(h, w, th, tw)
        results.append((value, *torch.autograd.grad(value, [h, w])))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_one_head_for_both_compiles_into_one_graph():
    """Both sides train it."""

    def loss(h, th, w):
        found = fastpo.linear_divergence(h, w, th, w, kind="jsd", teacher_grad=True)
        return found.divergence.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=COMPARING)):
        h, w, *_ = sides()
        value = function(h, h.detach() * 2, w)
        results.append((value, *torch.autograd.grad(value, [h, w])))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("budget", [0, 5 * 8 * 211, None])
def test_as_large_on_tensors_that_hold_nothing(budget):
    """What is kept and what comes out have the sizes of a real call."""

    def sizes():
        saved = []
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda x: (saved.append(x), x)[1], lambda x: x
            ),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("fastpo.ops.linear_divergence.stays", nullcontext)
            h, w, _, th, tw, _ = sides()
            found = fastpo.linear_divergence(h, w, th, tw, kind="jsd", budget=budget).divergence
            grads = torch.autograd.grad(found.sum(), [h, w])
        return [(x.shape, x.dtype) for x in (found, *saved, *grads)]

    real = sizes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert sizes() == real

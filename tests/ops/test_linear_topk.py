"""`linear_topk` and `sample_topk` on every backend: the words, their values, their gradients."""

from __future__ import annotations

import pytest
import torch
from _draws import assert_draws
from _probes import Widest
from test_linear_logps import BACKENDS as ALL
from test_linear_logps import DEVICE, OPTIONS, dtypes_of

import fastpo
from fastpo import planner, reference
from fastpo.ops.walks import best_words
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head

# Anchored products are for `linear_logps`; here that name means the row kernels of triton.
BACKENDS = [name for name in ALL if name not in ("anchored", "cutlass")]

# name -> budget in tokens; None: a frozen head
BUDGETS = {"keep": 10**6, "lean": 0, "some": 9, "frozen": None}


def arguments(inputs: HeadInputs) -> dict:
    return {"hidden": inputs.hidden, "weight": inputs.weight, "bias": inputs.bias}


def gradients(inputs: HeadInputs, values: torch.Tensor, lse: torch.Tensor) -> dict:
    """Of a loss that sends a different gradient into every value and every lse."""
    device = values.device  # drawn there: a copy from the host would wait
    g = torch.Generator(device).manual_seed(1)
    factors = (torch.randn(x.shape, generator=g, device=device).to(x) for x in (values, lse))
    loss = sum((f * x).sum() for f, x in zip(factors, (values, lse), strict=True))
    leaves = inputs.leaves()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def at(inputs: HeadInputs, ids: torch.Tensor, mask: torch.Tensor | None, **options):
    """Eager values of given words, lse, and gradients."""
    found = reference.linear_topk(
        **arguments(inputs), k=inputs.weight.shape[0], mask=mask, **options
    )
    values = torch.zeros_like(found.values).scatter(-1, found.ids, found.values).gather(-1, ids)
    if mask is not None:
        values = values * mask.unsqueeze(-1)
    return values, found.lse, gradients(inputs, values, found.lse)


def draw(inputs: HeadInputs, k: int, backend: str, budget: str, dtype, exclude, mask, options):
    """Fused, eager and true results for the words that the fused list holds."""
    ours = inputs.like(dtype)
    tokens = BUDGETS[budget]
    if tokens is None:
        ours.weight.requires_grad_(False)
        if ours.bias is not None:
            ours.bias.requires_grad_(False)
    excluded = inputs.labels if exclude else None
    found = fastpo.linear_topk(
        **arguments(ours),
        k=k,
        exclude=excluded,
        mask=mask,
        budget=None if tokens is None else tokens * len(inputs.weight) * dtype.itemsize,
        backend=backend,
        **options,
    )
    assert found.values.dtype == found.lse.dtype == torch.float32
    assert (found.values.diff(dim=-1) <= 0).all()
    exact, same = inputs.like(torch.float64), inputs.like(dtype)
    best = reference.linear_topk(**arguments(exact), k=k, exclude=excluded, mask=mask, **options)
    if dtype == torch.float32:
        assert torch.equal(found.ids, best.ids)
    results = []
    for x in (same, exact):
        values, lse, grads = at(x, found.ids, mask, **options)
        results.append({"values": values, "lse": lse, **grads})
    eager, truth = results
    eager["best"], truth["best"] = eager["values"].sort(-1, True)[0], best.values
    fused = {"values": found.values, "lse": found.lse, "best": found.values}
    fused |= gradients(ours, found.values, found.lse)
    assert all(fused[name].dtype == dtype for name in ours.leaves())
    return fused, eager, truth


def check(
    shape, k: int, backend: str, budget: str, dtype, *, draws=3, exclude=False, share=1.0,
    options=None, **head,
):  # fmt: skip
    """share: of the rows that are scored."""
    results = []
    for seed in range(draws):
        inputs = make_head(*shape, dtype=dtype, device=DEVICE, seed=seed, **head)
        mask = None
        if share < 1:
            g = torch.Generator().manual_seed(seed)
            mask = torch.rand(shape[0], generator=g).to(DEVICE) < share
        results.append(draw(inputs, k, backend, budget, dtype, exclude, mask, options or {}))
    assert_draws(results)


@pytest.mark.parametrize("options", OPTIONS, ids=list(OPTIONS))
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, budget, options):
    check(
        (23, 1003, 32), 7, backend, budget, torch.float32, bias=True, exclude=True, share=0.7,
        options=OPTIONS[options],
    )  # fmt: skip


@pytest.mark.parametrize("budget", ["keep", "frozen"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b in BACKENDS for d in dtypes_of(b)], ids=str
)
def test_sixteen_bit_inputs(backend, dtype, budget):
    check((40, 2049, 48), 10, backend, budget, dtype, draws=1, exclude=True)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows(backend, budget):
    for k in (1, 3):
        check((12, 300, 16), k, backend, budget, torch.float32, peak=60.0)


# tokens, vocabulary, hidden, k
SHAPES = [
    (0, 5, 8, 2), (1, 1, 1, 1), (1, 2, 3, 2), (5, 70, 16, 70), (3, 4097, 7, 3), (4, 900, 8, 400),
]  # fmt: skip


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_under_a_softcap(backend, excluded):
    """The maximum is of the listed logits: another tanh's would be off by their last bit."""
    weight = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    z = 50 * torch.tanh(weight[:256].double() @ weight.double().T / 50)
    log_p = (z / 0.5).log_softmax(-1)
    best = log_p.argmax(-1) if excluded else None
    options = {"softcap": 50.0, "temperature": 0.5, "backend": backend, "exclude": best}
    found = fastpo.linear_topk(weight[:256], weight, 1, **options)
    expected = log_p.gather(1, found.ids).squeeze(1)
    error = (found.values.squeeze(1) - expected)[expected > -0.5].abs()
    assert found.values.max() <= 0 and (excluded or error.max() < 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, shape):
    check(shape[:3], shape[3], backend, "lean", torch.float32, draws=8)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_token_blocks_and_vocabulary_tiles(backend, budget, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(16, 64))
    check(
        (20, 150, 24), 5, backend, budget, torch.float32, draws=6, bias=True, exclude=True,
        ignored=0.2, options={"softcap": 12.0},
    )  # fmt: skip


@pytest.mark.parametrize("tile", [7, 64, 10_000])
@pytest.mark.parametrize("k", [1, 4, 33])
def test_ties_go_to_the_lowest_word(k, tile, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(8, tile))
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-2, 3, (n, 2), generator=g).float() for n in (20, 500))
    hidden[0] = 0.0  # all words tie, with either sign of zero
    exclude = torch.randint(-1, 500, (20,), generator=g)
    exclude[0] = 0
    given = [x.to(DEVICE) for x in (hidden, weight)]
    found = fastpo.linear_topk(*given, k, exclude=exclude.to(DEVICE))
    wanted = reference.linear_topk(hidden.double(), weight.double(), k, exclude=exclude)
    assert torch.equal(found.ids.cpu(), wanted.ids)


def test_keys_hold_every_float_and_word():
    z = torch.tensor([-float("inf"), -1e30, -1.5, -1e-40, 0.0, 1e-40, 2.0, 3e38, float("inf")])
    words = torch.arange(len(z)) * 400_000_000
    keys = best_words.pack(z, words)
    assert (keys.diff() > 0).all() and (keys > best_words.NEVER).all()
    back, back_words = best_words.unpack(keys)
    assert torch.equal(back, z) and torch.equal(back_words, words)
    tied = best_words.pack(torch.tensor([0.0, -0.0]), torch.tensor([4, 3]))
    assert tied[1] > tied[0]


@pytest.mark.parametrize("tile", [2, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_excluded_word_comes_behind_words_of_probability_zero(backend, tile, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(8, tile))
    inputs = make_head(4, 9, 8, bias=True, device=DEVICE)
    inputs.bias[2:] = float("-inf")
    exclude = torch.full((4,), 3, device=DEVICE)
    found = fastpo.linear_topk(**arguments(inputs), k=8, exclude=exclude, backend=backend)
    assert found.ids[:, 2:].tolist() == [[2, 4, 5, 6, 7, 8]] * 4
    assert found.values[:, 2:].isneginf().all() and found.values[:, :2].isfinite().all()


@pytest.mark.skipif("anchored" not in ALL, reason="not there")
def test_anchored_runs_as_triton():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # what it serves
    x = make_head(7, 90, 16, bias=True, device=DEVICE, dtype=dtype)
    results = []
    for backend in ("anchored", "triton"):
        own = x.like(dtype)
        found = fastpo.linear_topk(**arguments(own), k=3, backend=backend)
        grads = torch.autograd.grad(found.values.sum(), list(own.leaves().values()))
        results.append((*found, *grads))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_head_keeps_no_probabilities(trained):
    hidden = torch.randn(8, 64, device=DEVICE, requires_grad=True)
    weight = torch.randn(500, 64, device=DEVICE, requires_grad=trained)
    values = fastpo.linear_topk(hidden, weight, 3).values
    (node, _), *_ = values.grad_fn.next_functions
    saved = sum(x.numel() for x in node.saved_tensors if x is not None)
    kept = saved - hidden.numel() - weight.numel()
    assert (kept >= 8 * 500) == trained


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_may_hold_anything(backend, budget):
    inputs = make_head(6, 50, 8, device=DEVICE).like(torch.float32)
    mask = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    with torch.no_grad():
        inputs.hidden[1] = float("nan")
    found = fastpo.linear_topk(**arguments(inputs), k=3, mask=mask, backend=backend)
    assert not any(x[~mask].any() for x in found)
    grads = gradients(inputs, found.values, found.lse)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["dhidden"][~mask].any()
    nothing = fastpo.linear_topk(**arguments(inputs), k=3, mask=mask & False, backend=backend)
    assert not any(x.any() for x in nothing)
    assert not any(g.any() for g in gradients(inputs, nothing.values, nothing.lse).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_hidden_state_gives_nan_in_its_row_only(backend, bad):
    inputs = make_head(5, 90, 8, device=DEVICE).like(torch.float32)
    inputs.weight.requires_grad_(False)
    with torch.no_grad():
        inputs.hidden[2, 3] = bad
    found = fastpo.linear_topk(**arguments(inputs), k=4, backend=backend)
    rows = [False, False, True, False, False]
    assert found.values.isnan().all(1).tolist() == found.lse.isnan().tolist() == rows
    grads = gradients(inputs, found.values, found.lse)
    assert grads["dhidden"].isnan().any(1).tolist() == rows
    assert found.sample().values.isnan().tolist() == rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice_with_and_without_gradient(backend):
    inputs = make_head(30, 1500, 40, device=DEVICE)
    runs = []
    for grad in (True, True, False):
        x = inputs.like(torch.float32, grad=grad)
        found = fastpo.linear_topk(**arguments(x), k=5, backend=backend)
        assert found.values.requires_grad == grad
        runs.append((*found, *(gradients(x, found.values, found.lse).values() if grad else ())))
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=False))


@pytest.mark.parametrize("budget", ["keep", "frozen"])
def test_autocast_with_float32_weights(budget):
    for seed in range(3):
        inputs = make_head(20, 700, 32, device=DEVICE, seed=seed)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            ours = inputs.like(torch.float32)
            ours.weight.requires_grad_(budget == "keep")
            found = fastpo.linear_topk(**arguments(ours), k=4)
            eager = at(inputs.like(torch.float32), found.ids, None)
        truth = at(inputs.like(torch.float64), found.ids, None)
        assert_as_good_as_eager("values", found.values, eager[0], truth[0])
        for name, grad in gradients(ours, found.values, found.lse).items():
            assert grad.dtype == torch.float32
            assert_as_good_as_eager(name, grad, eager[2][name], truth[2][name])


def test_leading_dimensions_and_a_gradient_of_the_weight_alone():
    hidden, weight = torch.randn(2, 3, 8), torch.randn(40, 8, requires_grad=True)
    found = fastpo.linear_topk(hidden, weight, 5)
    assert found.values.shape == found.ids.shape == (2, 3, 5) and found.lse.shape == (2, 3)
    (dweight,) = torch.autograd.grad(found.values[..., 1].sum(), weight)
    truth = weight.detach().double().requires_grad_()
    loss = reference.linear_topk(hidden.double(), truth, 5).values[..., 1].sum()
    torch.testing.assert_close(
        dweight.double(), torch.autograd.grad(loss, truth)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("k", [1, 20, 500])
def test_no_tensor_of_tokens_times_words(k, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(32, 256))
    inputs = make_head(128, 4000, 8).like(torch.float32)
    with Widest() as widest:
        found = fastpo.linear_topk(**arguments(inputs), k=k, budget=0)
        gradients(inputs, found.values, found.lse)
    assert widest.elements <= max(32 * (256 + k) + 1, 128 * k, inputs.weight.numel())


def test_samples_follow_the_probabilities():
    values = torch.tensor([0.5, 0.3, 0.1]).log().expand(40_000, 3)
    ids = torch.tensor([7, 2, 9]).expand(40_000, 3)
    topk = fastpo.TopK(values, ids, torch.zeros(40_000))
    for temperature in (1.0, 0.5):
        wanted = torch.softmax(values[0] / temperature, 0)
        drawn = topk.sample(temperature=temperature, generator=torch.Generator().manual_seed(0))
        share = torch.stack([(drawn.ids == word).float().mean() for word in ids[0]])
        assert (share - wanted).abs().max() < 0.01
        listed = (ids == drawn.ids.unsqueeze(1)).float().argmax(1, keepdim=True)
        assert torch.equal(drawn.values, values.gather(1, listed).squeeze(1))
    again = fastpo.sample_topk(topk, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.ids, topk.sample(generator=torch.Generator().manual_seed(0)).ids)


def test_a_sample_is_never_the_excluded_word_and_carries_gradient():
    inputs = make_head(50, 40, 8).like(torch.float32)
    found = fastpo.linear_topk(**arguments(inputs), k=4, exclude=inputs.labels)
    drawn = found.sample(generator=torch.Generator().manual_seed(0))
    assert (drawn.ids != inputs.labels).all() and drawn.values.requires_grad
    scored = fastpo.linear_logps(inputs.hidden, inputs.weight, drawn.ids).logps
    torch.testing.assert_close(drawn.values, scored, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(drawn.values.sum(), inputs.hidden)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(scored.sum(), inputs.hidden)[0])


def test_masked_tokens_may_exclude_anything():
    inputs = make_head(6, 40, 8)
    mask, exclude = torch.arange(6) % 2 > 0, inputs.labels.clone()
    expected = fastpo.linear_topk(inputs.hidden, inputs.weight, 3, exclude=exclude, mask=mask)
    exclude[0] = 10**6
    found = fastpo.linear_topk(inputs.hidden, inputs.weight, 3, exclude=exclude, mask=mask)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


H, V = 4, 10
WORDS = torch.zeros(3, dtype=torch.int64)
ERRORS = [
    ({"k": 0}, r"k: expected an integer in \[1, 10\], got 0"),
    ({"k": 11}, r"k: expected an integer in \[1, 10\], got 11"),
    ({"k": 10, "exclude": WORDS}, r"k: expected an integer in \[1, 9\], got 10"),
    ({"k": 2.0}, r"k: expected an integer in \[1, 10\], got 2.0"),
    ({"k": True}, r"k: expected an integer .* got True"),
    ({"exclude": WORDS[:2]}, r"exclude: expected shape \(3,\), got \(2,\)"),
    ({"exclude": WORDS.int()}, r"exclude: expected dtype torch.int64, got torch.int32"),
    ({"exclude": WORDS + V}, r"exclude: expected values below 10, got 10"),
    ({"exclude": WORDS.to("meta")}, r"exclude: expected device cpu, got meta"),
    ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask: expected shape \(3,\), got \(4,\)"),
    ({"mask": torch.ones(3)}, r"mask: expected dtype torch.bool, got torch.float32"),
    ({"weight": torch.zeros(V, H + 1)}, r"weight: expected shape \(V, 4\), got \(10, 5\)"),
    ({"hidden": torch.zeros(3, H).double()}, r"hidden: expected dtype float32, .*float64"),
    ({"bias": torch.zeros(V + 1)}, r"bias: expected shape \(10,\), got \(11,\)"),
    ({"temperature": 0.0}, r"temperature: expected a finite number > 0, got 0.0"),
    ({"softcap": 0.0}, r"softcap: expected a finite number > 0 or None, got 0.0"),
    ({"budget": -1}, r"budget: expected bytes >= 0 or None, got -1"),
    ({"backend": "mps"}, r"backend: expected one of .* got 'mps'"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_value_errors(changes, message):
    given = {"hidden": torch.zeros(3, H), "weight": torch.zeros(V, H), "k": 2}
    with pytest.raises(ValueError, match=message):
        fastpo.linear_topk(**(given | changes))


def test_sampling_refuses_a_temperature_of_zero():
    found = fastpo.linear_topk(torch.zeros(3, H), torch.zeros(V, H), 2)
    with pytest.raises(ValueError, match=r"temperature: expected a finite number > 0, got 0.0"):
        found.sample(temperature=0.0)
    with pytest.raises(ValueError, match=r"topk: expected a fastpo.TopK, got tuple"):
        fastpo.sample_topk((1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("budget", BUDGETS)
def test_waits_for_no_device_value(budget):
    inputs = make_head(64, 1000, 32, device=DEVICE, dtype=torch.bfloat16).like(torch.bfloat16)
    mask = torch.rand(64, device=DEVICE) < 0.5

    def step() -> None:
        found = fastpo.linear_topk(**arguments(inputs), k=8, exclude=inputs.labels, mask=mask)
        gradients(inputs, found.values, found.sample().values)

    step()  # compile outside the guard
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

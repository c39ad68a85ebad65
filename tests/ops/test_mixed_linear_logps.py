"""`mixed_linear_logps` on every backend, judged against the float64 mixture."""

from __future__ import annotations

import pytest
import torch
from _draws import assert_draws
from _probes import Products, Widest
from test_linear_logps import BACKENDS as ALL
from test_linear_logps import DEVICE, DIFFERENTIABLE, dtypes_of, weights
from torch import Tensor

import fastpo
from fastpo import planner, reference
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, make_head

# Anchored products are for `linear_logps`; here that name means the row kernels of triton.
BACKENDS = [name for name in ALL if name not in ("anchored", "cutlass")]

OPTIONS = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scales": (1.3, -0.5)},
    "one cap": {"softcaps": (None, 5.0)},
    "all": {"temperature": 1.6, "softcaps": (30.0, 8.0), "logit_scales": (0.8, 1.1)},
}
FROZEN = {"none": (), "second": (1,), "all weights": (0, 1, 2)}  # heads without d weight


def make_mixture(
    tokens: int,
    vocab: int,
    *widths: int,
    dtype=torch.float32,
    bias=True,
    ignored=0.0,
    peak=6.0,
    seed=0,
) -> tuple[list[HeadInputs], Tensor, Tensor]:
    """Heads of several widths, labels, and coefficients per token."""
    heads = [
        make_head(
            tokens, vocab, width, dtype=dtype, device=DEVICE, bias=bias and i != 1,
            seed=10 * seed + i, ignored=ignored, peak=peak,
        )
        for i, width in enumerate(widths)
    ]  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    coefficients = torch.rand(tokens, len(widths), generator=g).to(DEVICE) * 1.5 - 0.2
    return heads, heads[0].labels, coefficients


def like(heads: list[HeadInputs], dtype: torch.dtype, *, grad: bool = True, frozen=()):
    copies = [head.like(dtype, grad=grad) for head in heads]
    for i in frozen[: len(copies)]:
        copies[i].weight.requires_grad_(False)
    return copies


def operands(heads: list[HeadInputs]) -> dict:
    return {
        "hiddens": [x.hidden for x in heads],
        "weights": [x.weight for x in heads],
        "biases": [x.bias for x in heads],
    }


def leaves(heads: list[HeadInputs]) -> dict[str, Tensor]:
    return {f"{name} {i}": x for i, head in enumerate(heads) for name, x in head.leaves().items()}


def gradients(heads: list[HeadInputs], stats: fastpo.TokenStats, names=DIFFERENTIABLE) -> dict:
    found = leaves(heads)
    return dict(
        zip(found, torch.autograd.grad(weights(stats, names), list(found.values())), strict=True)
    )


def eager_of(heads, coefficients, labels, dtype, names, options):
    x = like(heads, dtype)
    m = torch.as_tensor(coefficients, device=DEVICE)
    stats = reference.mixed_linear_logps(**operands(x), coefficients=m, labels=labels, **options)
    return stats, gradients(x, stats, names)


def draw(heads, coefficients, labels, backend, dtype, names, frozen, options):
    """Fused, eager and true results."""
    x = like(heads, dtype, frozen=frozen)
    stats = fastpo.mixed_linear_logps(
        **operands(x), coefficients=coefficients, labels=labels, outputs=OUTPUTS, backend=backend,
        **options,
    )  # fmt: skip
    grads = gradients(x, stats, names)
    assert all(grad.dtype == dtype for grad in grads.values())
    results = [stats._asdict() | grads]
    for precision in (dtype, torch.float64):
        slow, grads = eager_of(heads, coefficients, labels, precision, names, options)
        results.append(slow._asdict() | grads)
    if dtype != torch.float32:
        results[0].pop("is_top1")
    return results


def check(
    *shape, backend, dtype=torch.float32, draws=6, names=DIFFERENTIABLE, frozen=(), fixed=None,
    last_label=False, options=None, **mixture,
):  # fmt: skip
    """fixed: coefficients for all tokens, in place of drawn ones per token."""
    results = []
    for seed in range(draws):
        heads, labels, m = make_mixture(*shape, dtype=dtype, seed=seed, **mixture)
        if last_label and len(labels):
            labels[-1] = shape[1] - 1
        m = m if fixed is None else fixed
        results.append(draw(heads, m, labels, backend, dtype, names, frozen, options or {}))
    assert_draws(results)


@pytest.mark.parametrize("options", OPTIONS, ids=list(OPTIONS))
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, frozen, options):
    check(
        23, 1003, 32, 20, ignored=0.3, backend=backend, frozen=FROZEN[frozen],
        fixed=None if frozen == "second" else (0.8, 0.3), options=OPTIONS[options],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b in BACKENDS for d in dtypes_of(b)], ids=str
)
def test_sixteen_bit_inputs(backend, dtype):
    check(
        40, 2049, 48, 64, 16, backend=backend, dtype=dtype, draws=1, bias=False, names=("logps",),
        options={"softcaps": (None, 20.0, None)},
    )  # fmt: skip


SHAPES = [(0, 5, 8, 3), (1, 1, 1, 1), (1, 2, 3), (5, 70, 16, 9, 4), (3, 4097, 7, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, shape):
    # A maximum over few tokens: eager is lucky in some draws, and all must outnumber them.
    check(*shape, backend=backend, draws=48, last_label=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows(backend):
    check(12, 300, 16, 8, peak=60.0, backend=backend, fixed=torch.tensor([0.5, 0.5], device=DEVICE))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_token_blocks_and_vocabulary_tiles(backend, per_token, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(32, 128))
    fixed = None if per_token else torch.tensor([0.8, 0.3], device=DEVICE)
    own = {"backend": backend, "fixed": fixed, "options": {"softcaps": (12.0, None)}}
    check(50, 300, 24, 12, ignored=0.2, draws=2, **own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_head_is_linear_logps(backend):
    (head,), labels, _ = make_mixture(20, 500, 16, ignored=0.2)
    given = {"temperature": 0.7, "outputs": OUTPUTS, "backend": backend}
    mixed = fastpo.mixed_linear_logps(
        [head.hidden], [head.weight], [1.0], labels, biases=[head.bias], softcaps=[9.0], **given
    )
    plain = fastpo.linear_logps(
        head.hidden, head.weight, labels, bias=head.bias, softcap=9.0, **given
    )
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(mixed, name), getattr(plain, name), msg=name)


def test_extremes_of_the_mixture_are_policy_and_reference():
    heads, labels, _ = make_mixture(20, 500, 16, 24)
    for i, m in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        mixed = fastpo.mixed_linear_logps(**operands(heads), coefficients=m, labels=labels)
        own = heads[i]
        alone = fastpo.linear_logps(own.hidden, own.weight, labels, bias=own.bias)
        torch.testing.assert_close(mixed.logps, alone.logps)
        assert mixed.entropy is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend):
    heads, labels, coefficients = make_mixture(9, 130, 8, 6)
    labels[4] = -100
    x = like(heads, torch.float32)
    with torch.no_grad():
        x[1].hidden[4] = coefficients[4] = float("nan")
    stats = fastpo.mixed_linear_logps(
        **operands(x), coefficients=coefficients, labels=labels, outputs=OUTPUTS, backend=backend
    )
    assert all(not value[4] and value.isfinite().all() for value in stats)
    grads = gradients(x, stats)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["dhidden 1"][4].any()


def test_an_ignored_token_alone_may_hold_anything():
    """Of one token [M] coefficients are its own."""
    given = [STATES[0], STATES[0]], [HEAD, HEAD], torch.full((2,), float("nan"))
    assert fastpo.mixed_linear_logps(*given, torch.tensor(-100)).logps == 0
    with pytest.raises(ValueError, match="coefficients: expected finite numbers of float32"):
        fastpo.mixed_linear_logps(*given, torch.tensor(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored(backend):
    heads, labels, coefficients = make_mixture(6, 50, 8, 4)
    x = like(heads, torch.float32)
    stats = fastpo.mixed_linear_logps(
        **operands(x), coefficients=coefficients, labels=labels.fill_(-100), outputs=OUTPUTS,
        backend=backend,
    )  # fmt: skip
    assert not any(value.any() for value in stats)
    assert not any(grad.any() for grad in gradients(x, stats).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_hidden_state_gives_nan_in_its_row_only(backend, bad):
    heads, labels, coefficients = make_mixture(5, 90, 8, 4)
    x = like(heads, torch.float32, frozen=(0, 1))
    with torch.no_grad():
        x[1].hidden[2, 3] = bad
    stats = fastpo.mixed_linear_logps(
        **operands(x), coefficients=coefficients, labels=labels, backend=backend
    )
    rows = [False, False, True, False, False]
    assert stats.logps.isnan().tolist() == rows
    names = ("dhidden 0", "dhidden 1")
    found = torch.autograd.grad(stats.logps.sum(), [leaves(x)[name] for name in names])
    assert all(grad.isnan().any(1).tolist() == rows for grad in found)


def test_a_word_removed_by_one_head_is_removed_from_the_mixture():
    heads, labels, _ = make_mixture(7, 60, 8, 6)
    labels.clamp_(20, 50)
    heads[0].bias[:20] = float("-inf")
    left = [
        HeadInputs(x.hidden, x.weight[20:], x.labels, None if x.bias is None else x.bias[20:])
        for x in heads
    ]
    m = (0.5, 0.7)
    ours = like(heads, torch.float32)
    stats = fastpo.mixed_linear_logps(
        **operands(ours), coefficients=m, labels=labels, outputs=OUTPUTS
    )
    truth, grads = eager_of(left, m, labels - 20, torch.float64, ("logps",), {})
    torch.testing.assert_close(stats.logps.double(), truth.logps, rtol=1e-5, atol=1e-5)
    found = gradients(ours, stats, ("logps",))
    for name in ("dhidden 0", "dhidden 1"):
        torch.testing.assert_close(found[name].double(), grads[name], rtol=1e-4, atol=1e-4)


def test_same_bits_twice_with_and_without_gradient():
    heads, labels, coefficients = make_mixture(30, 1500, 40, 20)
    runs = []
    for grad in (True, True, False):
        x = like(heads, torch.float32, grad=grad)
        stats = fastpo.mixed_linear_logps(
            **operands(x), coefficients=coefficients, labels=labels, outputs=OUTPUTS
        )
        runs.append((*stats, *(gradients(x, stats).values() if grad else ())))
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=False))


def test_leading_dimensions_shared_weights_and_partial_gradients():
    weight = torch.randn(40, 8)
    hiddens = [torch.randn(2, 3, 8), torch.randn(2, 3, 8, requires_grad=True)]
    labels, m = torch.randint(0, 40, (2, 3)), torch.rand(2, 3, 2)
    stats = fastpo.mixed_linear_logps(hiddens, [weight, weight], m, labels)
    assert stats.logps.shape == (2, 3)
    (found,) = torch.autograd.grad(stats.logps.sum(), hiddens[1])
    twin = [x.detach().double().requires_grad_() for x in hiddens]
    loss = reference.mixed_linear_logps(twin, [weight.double()] * 2, m, labels).logps.sum()
    (truth,) = torch.autograd.grad(loss, twin[1])
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


def test_autocast_with_float32_weights():
    heads, labels, coefficients = make_mixture(20, 700, 32, 16, bias=False)
    given = (heads, coefficients, labels)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = draw(*given, BACKENDS[-1], torch.float32, ("logps",), (), {})
    results[0].pop("is_top1")
    truth, grads = eager_of(*given, torch.float64, ("logps",), {})
    assert_draws([(results[0], results[1], truth._asdict() | grads)])


@pytest.mark.parametrize("softcaps", [(None, None), (9.0, 9.0)])
def test_no_tensor_of_tokens_times_words(softcaps, monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(32, 256))
    heads, labels, coefficients = make_mixture(128, 4000, 8, 4)
    x = like(heads, torch.float32)
    with Widest() as widest:
        stats = fastpo.mixed_linear_logps(
            **operands(x), coefficients=coefficients, labels=labels, softcaps=softcaps,
            outputs=("logps", "lse"),
        )  # fmt: skip
        gradients(x, stats, ("logps", "lse"))
    assert widest.elements <= max(32 * 256, 4000 * 8)


@pytest.mark.parametrize(("trained", "backward"), [((0,), 5), ((1,), 4), ((0, 1), 7)])
def test_products_of_the_heads_that_are_trained(trained, backward, library_products):
    """Both logits again, and of each trained head d hidden, d weight, and z if it is capped."""
    hiddens, weights = ([torch.randn(n, 8) for _ in range(2)] for n in (32, 64))
    wanted = [x.requires_grad_() for i in trained for x in (hiddens[i], weights[i])]
    given = hiddens, weights, (0.7, 0.3), torch.arange(32)
    loss = fastpo.mixed_linear_logps(*given, softcaps=(9.0, None)).logps.sum()
    with Products() as products:
        torch.autograd.grad(loss, wanted)
    assert products.count == backward * 32 * 64 * 8


H, V = 4, 10
HEAD = torch.zeros(V, H)
STATES = torch.zeros(3, H)
ERRORS = [
    ({"hiddens": [], "weights": []}, r"hiddens: expected at least one head, got none"),
    ({"weights": [HEAD]}, r"weights: expected 2 entries, got 1"),
    ({"weights": [HEAD, HEAD[:7]]}, r"head 1: weight: expected 10 words as in head 0, got 7"),
    ({"weights": [HEAD, HEAD[:, :3]]}, r"head 1: weight: expected shape \(V, 4\), got \(10, 3\)"),
    ({"hiddens": [STATES, STATES[:2]]}, r"head 1: hidden: expected shape \(3, 4\), got \(2, 4\)"),
    ({"labels": torch.zeros(2).long()}, r"^labels: expected shape \(3,\), got \(2,\)"),
    ({"hiddens": [STATES, STATES.double()]}, r"head 1: hidden: expected dtype float32.*float64"),
    ({"biases": [None]}, r"biases: expected 2 entries, one per head, got \[None\]"),
    ({"biases": [None, HEAD[0]]}, r"head 1: bias: expected shape \(10,\), got \(4,\)"),
    ({"softcaps": 3.0}, r"softcaps: expected 2 entries, one per head, got 3.0"),
    ({"softcaps": (None, -1.0)}, r"softcap: expected a finite number > 0 or None, got -1.0"),
    ({"logit_scales": (1.0,)}, r"logit_scales: expected 2 entries, one per head, got \(1.0,\)"),
    ({"temperature": 0.0}, r"temperature: expected a finite number > 0, got 0.0"),
    ({"temperature": STATES}, r"temperature: .* got a tensor .* one number is for all tokens"),
    ({"outputs": "logps"}, r"outputs: expected a tuple of logps"),
    ({"coefficients": (1.0,)}, r"coefficients: expected 2 finite numbers, got \(1.0,\)"),
    ({"coefficients": (1.0, float("nan"))}, r"coefficients: expected 2 finite numbers, got .*nan"),
    ({"coefficients": (1e39, 0.5)}, r"expected 2 finite numbers of float32, got 1e\+39"),
    (
        {"coefficients": torch.tensor([0.5, float("nan")])},
        r"coefficients: expected finite numbers of float32, got nan at \(1,\)",
    ),
    (
        {"coefficients": torch.ones(3, 2, dtype=torch.float64).fill_diagonal_(1e39)},
        r"coefficients: expected finite numbers of float32, got inf at \(0, 0\)",
    ),
    (
        {"coefficients": torch.ones(4, 2)},
        r"coefficients: expected shape \(2,\) or \(3, 2\), got \(4, 2\)",
    ),
    ({"coefficients": torch.ones(2).long()}, r"coefficients: expected a floating dtype, got torch"),
    (
        {"coefficients": torch.ones(2, requires_grad=True)},
        r"coefficients: expected a tensor without gradient, got requires_grad=True",
    ),
    ({"coefficients": torch.ones(2, device="meta")}, r"coefficients: expected device cpu, got"),
    ({"labels": torch.tensor([0, V, 1])}, r"labels: expected values in .* got 10 at row 1"),
    ({"backend": "mps"}, r"backend: expected one of .* got 'mps'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_value_errors(changes, message):
    given = {
        "hiddens": [STATES, STATES],
        "weights": [HEAD, HEAD],
        "coefficients": (0.5, 0.5),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        fastpo.mixed_linear_logps(**(given | changes))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_waits_for_no_device_value():
    heads, labels, coefficients = make_mixture(64, 1000, 32, 16, dtype=torch.bfloat16, ignored=0.2)
    x = like(heads, torch.bfloat16)

    def step() -> None:
        stats = fastpo.mixed_linear_logps(**operands(x), coefficients=coefficients, labels=labels)
        torch.autograd.grad(stats.logps.sum(), list(leaves(x).values()))

    step()  # compile outside the guard
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

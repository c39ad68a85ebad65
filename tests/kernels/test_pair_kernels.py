"""The Triton row kernels of two heads, judged against float64 and PyTorch's rows.

Interpreted without a GPU, where a row costs 20 ms: few rows here, the long table of
test_pair_rows.py on a GPU only.
"""

from __future__ import annotations

import pytest
import torch
from _pair_problem import (
    NEAR_LIMITS,
    PLAIN,
    RULES,
    Maps,
    Problem,
    add_up,
    assert_as_good,
    assert_near_limit,
    constants_of,
    fold,
    make_constants,
    make_factors,
    make_problem,
    turn,
    whole_gradients,
    whole_state,
    whole_sums,
)
from _triton import DEVICE, MARKS
from torch import Tensor

import fastpo
from fastpo import planner, reference
from fastpo.ops.rows import registry
from fastpo.ops.rows.backend import LogitMap
from fastpo.ops.rows.pair import backend as P
from fastpo.ops.rows.pair import torch as pair_torch
from fastpo.ops.rows.pair import triton as pair_triton
from fastpo.testing import assert_as_good_as_eager, make_head

pytest.importorskip("triton")

from fastpo.kernels import _blocks, pair_rows

pytestmark = MARKS

INF, NAN = float("inf"), float("nan")
# Triton's interpreter truncates what it stores as bfloat16.
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
MAPS = {
    "plain": PLAIN,
    "scaled": (LogitMap(0.7, None, 1.3), LogitMap(1.2, None, -0.8)),
    "one_softcap": (LogitMap(0.9, 6.0, 1.2), LogitMap()),
    "softcaps": (LogitMap(0.7, 5.0), LogitMap(1.1, 30.0, -1.3)),
}
WIDE = 4099  # two steps of a program, the second of 3 columns
FIELDS = ("MAX", "MASS", "CROSS", "MOMENT", "SHIFT", "LOG_MASS", "TOTAL", "GRAD")
rules_table = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.mark.parametrize("name", [*FIELDS, "LARGEST", "LOWEST"])
def test_rows_are_where_the_contract_has_them(name: str) -> None:
    assert getattr(pair_rows, name).value == getattr(P, name)


@pytest.mark.parametrize("kind", P.KINDS)
def test_kinds_have_the_contract_s_numbers(kind: str) -> None:
    assert getattr(pair_rows, kind.upper()).value == P.KINDS.index(kind)


def assert_state(problem: Problem, over: int | None, entropy: bool) -> Tensor:
    ours = fold(pair_triton, problem, over, entropy, DEVICE)
    eager = whole_state(problem, over, entropy, torch.float32)
    truth = whole_state(problem, over, entropy, torch.float64)
    names = ("max", "mass", "teacher's max", "teacher's mass", "cross", "moment")
    for i, name in enumerate(names):
        assert_as_good(name, ours[i], eager[i], truth[i])
    return ours


def assert_sums(problem: Problem, rule: P.Rule) -> Tensor:
    constants = make_constants(problem)
    ours = add_up(pair_triton, problem, rule, constants, DEVICE)
    defined = add_up(pair_torch, problem, rule, constants)
    torch.testing.assert_close(ours, defined, rtol=1e-5, atol=1e-5)
    eager = whole_sums(problem, rule, constants, torch.float32)
    truth = whole_sums(problem, rule, constants, torch.float64)
    for i, name in enumerate(("f", "df/ds", "df/dt")):
        # Terms are float32, whatever they are summed in.
        assert_as_good(name, ours[i].float(), eager[i], truth[i])
    return ours


def assert_turn(problem: Problem, rule: P.Rule, dtype: torch.dtype = torch.float32) -> None:
    given = (problem, rule, make_constants(problem), make_factors(problem.rows))
    dtypes = (torch.float32, torch.float64)
    ours = turn(pair_triton, *given, dtype=dtype, device=DEVICE)
    defined = turn(pair_torch, *given)
    wide = [whole_gradients(*given, x) for x in dtypes]
    for name, o, d, e, t in zip(("student", "teacher"), ours, defined, *wide, strict=True):
        assert o is not None and d is not None and o.dtype == dtype
        assert_as_good(name, o, e.to(dtype), t)
        if dtype == torch.float32:
            torch.testing.assert_close(o, d, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v", [1, 33, WIDE])
@pytest.mark.parametrize("over", [None, 0, 1])
def test_state(over: int | None, v: int) -> None:
    for i, maps in enumerate((MAPS["scaled"], MAPS["one_softcap"])):
        problem = make_problem(4, v, maps, bias=i == 1, seed=v)
        ours = assert_state(problem, over, entropy=i == 1)
        defined = fold(pair_torch, problem, over, i == 1)
        torch.testing.assert_close(ours, defined, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
@rules_table
def test_sums_and_gradients(rule: P.Rule, maps: Maps) -> None:
    # Flat, so that many cells count: in a few peaked rows eager is sometimes exact by luck.
    bias = maps is not MAPS["scaled"]
    problem = make_problem(8, 70, maps, tiles=1, spread=1.5, bias=bias, seed=1)
    assert_sums(problem, rule)
    assert_turn(problem, rule)


@pytest.mark.parametrize("v", [1, WIDE])
@rules_table
def test_narrow_and_wide_tiles(rule: P.Rule, v: int) -> None:
    problem = make_problem(4, v, MAPS["softcaps"], seed=2)
    assert_sums(problem, rule)
    assert_turn(problem, rule)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["jsd", "reverse_kl"])
def test_gradients_in_halves(kind: str, dtype: torch.dtype) -> None:
    assert_turn(make_problem(4, 33, MAPS["one_softcap"], tiles=1, seed=3), RULES[kind], dtype)


@pytest.mark.parametrize("over", [0, 1])
def test_maxima_that_move_by_hundreds(over: int) -> None:
    """From tile to tile and within one; the student's against the teacher's."""
    problem = make_problem(2, WIDE, tiles=4, bias=False, seed=4)
    for i, shift in enumerate((0.0, 300.0, -500.0, 700.0)):
        problem.tiles[0][i].add_(shift)
        problem.tiles[1][i].sub_(shift)
    problem.tiles[0][0][:, _blocks.row_blocks(WIDE).v :] -= 400.0
    problem.tiles[1][3][:, _blocks.row_blocks(WIDE).v :] += 900.0
    assert_state(problem, over, entropy=True)
    mirrored = Problem((problem.tiles[1], problem.tiles[0]), (None, None), PLAIN)
    assert_state(mirrored, over, entropy=True)


def exclude(problem: Problem, heads: tuple[int, ...]) -> None:
    for i in heads:
        bias = problem.biases[i]
        assert bias is not None
        bias[5:20], bias[35:] = -INF, -INF


EXCLUDED = {"student": (0,), "teacher": (1,), "both": (0, 1)}


@pytest.mark.parametrize("heads", EXCLUDED)
@pytest.mark.parametrize("over", [0, 1])
def test_state_without_some_words(over: int, heads: str) -> None:
    """The last tile holds none."""
    problem = make_problem(2, 40, seed=5)
    exclude(problem, EXCLUDED[heads])
    assert assert_state(problem, over, entropy=True).isfinite().all()


@pytest.mark.parametrize("heads", EXCLUDED)
@rules_table
def test_sums_and_gradients_without_some_words(rule: P.Rule, heads: str) -> None:
    problem = make_problem(3, 40, tiles=1, seed=5)
    exclude(problem, EXCLUDED[heads])
    assert assert_sums(problem, rule).isfinite().all()
    assert_turn(problem, rule)


@pytest.mark.parametrize("over", [0, 1])
def test_a_first_tile_without_words_leaves_no_trace(over: int) -> None:
    problem = make_problem(3, 20, seed=6)
    for bias in problem.biases:
        assert bias is not None
        bias[:20] = -INF
    tiles = ([problem.tiles[0][1]], [problem.tiles[1][1]])
    biases = tuple(bias[20:] for bias in problem.biases if bias is not None)
    alone = Problem(tiles, (biases[0], biases[1]), PLAIN)
    found = fold(pair_triton, problem, over, True, DEVICE)
    assert torch.equal(found, fold(pair_triton, alone, over, True, DEVICE))


@pytest.mark.parametrize(("side", "bad"), [(0, NAN), (1, INF)])
@rules_table
def test_a_broken_row_stays_alone(rule: P.Rule, side: int, bad: float) -> None:
    problem = make_problem(3, 37, tiles=1, seed=7)
    problem.tiles[side][0][1, 17] = bad
    factors, found = make_factors(3), []
    for kernels, device in ((pair_triton, DEVICE), (pair_torch, "cpu")):
        state = fold(kernels, problem, side, True, device)
        constants = constants_of(state)
        sums = add_up(kernels, problem, rule, constants, device)
        grads = turn(kernels, problem, rule, constants, factors, device=device)
        found.append([state, sums, *(dx.t() for dx in grads if dx is not None)])
    for ours, defined in zip(*found, strict=True):
        torch.testing.assert_close(ours[:, ::2], defined[:, ::2], rtol=1e-5, atol=1e-5)
    state, sums, *grads = (x[:, 1] for x in found[0])
    assert state[P.MASS + 2 * side].isnan() and state[P.CROSS].isnan()
    assert state[P.MASS + 2 - 2 * side].isfinite()
    assert sums.isnan().any() and grads[side].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@rules_table
def test_no_gradient_where_grad_is_0(rule: P.Rule, dtype: torch.dtype) -> None:
    """Whatever the row holds, products and constants."""
    problem = make_problem(4, 37, MAPS["one_softcap"], tiles=1, seed=8)
    for (tile,) in problem.tiles:
        tile[1], tile[2, 3] = NAN, INF
    constants, factors = make_constants(problem), make_factors(4)
    constants[:, 1], factors[P.TOTAL, 2] = NAN, INF
    factors[P.GRAD, 1], factors[P.GRAD, 2] = 0.0, -0.0
    for dx in turn(pair_triton, problem, rule, constants, factors, dtype=dtype, device=DEVICE):
        assert dx is not None and torch.equal(dx[1:3], torch.zeros_like(dx[1:3]))
        assert dx[0].any() and dx[3].any()


def test_one_head_is_trained() -> None:
    problem = make_problem(3, 37, MAPS["softcaps"], tiles=1, seed=9)
    given = (problem, RULES["jsd"], make_constants(problem), make_factors(3))
    both = turn(pair_triton, *given, device=DEVICE)
    for i in range(2):
        found = turn(pair_triton, *given, wanted=(i == 0, i == 1), device=DEVICE)
        alone, expected = found[i], both[i]
        assert found[1 - i] is None and alone is not None and expected is not None
        assert torch.equal(alone, expected)


@rules_table
def test_probabilities_that_underflow_in_both_heads(rule: P.Rule) -> None:
    """p = q = 0, and subnormal numbers: terms of 0, no 0·inf."""
    problem = make_problem(3, 40, bias=False, tiles=1, seed=10)
    depths = torch.cat((torch.linspace(85.0, 110.0, 26), torch.tensor([500.0, 1e4, 1e30])))
    for (tile,) in problem.tiles:
        tile[:, : len(depths)] -= depths
    assert assert_sums(problem, rule).isfinite().all()
    assert_turn(problem, rule)


def sums_of(rule: P.Rule, s: Tensor, t: Tensor) -> Tensor:
    """A row per pair of log-probabilities: their own constants are 0."""
    problem = Problem(([s.unsqueeze(1)], [t.unsqueeze(1)]), (None, None), PLAIN)
    constants = torch.zeros(P.CONSTANTS, len(s))
    return add_up(pair_triton, problem, rule, constants, DEVICE)


def test_the_alpha_exponent_stops_at_40() -> None:
    s = torch.tensor([-100.0, -50.0, -20.0, -1.0, -1e30])
    t = torch.tensor([-1.0, -0.5, -3.0, -30.0, -1.0])
    sums = sums_of(P.Rule("alpha", 2.0), s, t)
    e = (2 * t - s).double().clamp_max(40).exp()
    p, q = s.double().exp(), t.double().exp()
    expected = torch.stack(((e + p) / 2 - q, (p - e) / 2, e - q))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-14)
    assert sums[2, 0] == sums[2, 1] == sums[2, 4]


@pytest.mark.parametrize("alpha", NEAR_LIMITS)
def test_alpha_near_its_limits(alpha: float) -> None:
    """1 - α and 1/(α·(α - 1)) of 1 - 2e-6 as float32 would be off by a hundredth, too."""
    assert_near_limit(pair_triton, alpha, DEVICE)


def test_tvd_has_no_slope_where_the_heads_agree() -> None:
    s = torch.tensor([-1.0, -2.0, -3.0, -1e30])
    t = torch.tensor([-1.0, -3.0, -2.0, -1e30])
    sign = torch.tensor([0.0, 0.5, -0.5, 0.0], dtype=torch.float64)
    p, q = s.double().exp(), t.double().exp()
    expected = torch.stack((sign * (p - q), sign * p, -sign * q))
    torch.testing.assert_close(sums_of(P.Rule("tvd"), s, t), expected, rtol=1e-6, atol=0.0)


@rules_table
def test_no_rows(rule: P.Rule) -> None:
    problem = make_problem(0, 7)
    assert fold(pair_triton, problem, 0, True, DEVICE).shape == (P.STATE, 0)
    constants, factors = torch.zeros(P.CONSTANTS, 0), torch.zeros(P.FACTORS, 0)
    assert add_up(pair_triton, problem, rule, constants, DEVICE).shape == (P.SUMS, 0)
    for dx in turn(pair_triton, problem, rule, constants, factors, device=DEVICE):
        assert dx is not None and dx.shape == (0, 14)


def leaves(tokens: int, vocab: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    student = make_head(tokens, vocab, width, bias=True)
    extra = make_head(tokens, vocab, width, bias=True, seed=1)
    tensors = [student.hidden, student.weight, extra.hidden * 0.7, extra.weight]
    tensors += [student.bias, extra.bias]
    return [x.to(DEVICE, dtype).requires_grad_() for x in tensors if x is not None]


def call(function, tensors: list[Tensor], upstream: Tensor, **options) -> dict[str, Tensor]:
    *both, bias, teacher_bias = tensors
    stats = function(*both, bias=bias, teacher_bias=teacher_bias, **options)
    loss = (stats.divergence * upstream.to(stats.divergence.dtype)).sum()
    grads = torch.autograd.grad(loss, tensors)
    found = {"divergence": stats.divergence, "entropy": stats.entropy}
    return found | {f"gradient {i}": grad for i, grad in enumerate(grads)}


def assert_divergence(rule: P.Rule, tensors: list[Tensor], **options) -> None:
    upstream = torch.linspace(-1, 1, len(tensors[0]), device=DEVICE)
    options = {"kind": rule.kind, "beta": 0.3, "alpha": rule.parameter, "softcap": 6.0, **options}
    fused = call(
        fastpo.linear_divergence, tensors, upstream, teacher_grad=True, backend="triton",
        outputs=("divergence", "entropy"), **options,
    )  # fmt: skip
    eager = call(reference.linear_divergence, tensors, upstream, **options)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = call(reference.linear_divergence, wide, upstream, **options)
    for name in truth:
        # One draw of a small problem: eager is sometimes lucky, and rounds other cells.
        assert_as_good_as_eager(name, fused[name], eager[name], truth[name], factor=4.0)


@rules_table
def test_linear_divergence(rule: P.Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(3, 64))
    kernels = registry.pair_kernels
    assert kernels("triton") is kernels("anchored") is pair_triton
    assert_divergence(rule, leaves(4, 83, 12), teacher_temperature=1.3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@rules_table
def test_linear_divergence_of_a_model_s_size(rule: P.Rule, dtype: torch.dtype) -> None:
    assert_divergence(rule, leaves(257, 128_256, 256, dtype))

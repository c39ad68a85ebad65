"""The row kernels of two heads against float64, as good as float32 PyTorch; one table of cases.

Every instruction set of this processor runs, and PyTorch's own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

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
from torch import Tensor

from fastpo.ops.rows import cpu as rows_cpu
from fastpo.ops.rows.backend import LogitMap
from fastpo.ops.rows.pair import backend as P
from fastpo.ops.rows.pair import cpu as pair_cpu
from fastpo.ops.rows.pair import torch as pair_torch
from fastpo.ops.rows.pair import triton as pair_triton

INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Backend:
    kernels: ModuleType
    device: str = "cpu"
    isa: int = 0


NATIVE_MISSING = pytest.mark.skipif(rows_cpu._C is None, reason="fastpo._C is not built")
BACKENDS = [pytest.param(Backend(pair_torch), id="torch")] + [
    pytest.param(Backend(pair_cpu, isa=isa), id=name) for isa, name in enumerate(rows_cpu.ISAS)
]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# The interpreter is too slow for this table: test_pair_kernels.py has its own.
ON_GPU = Backend(pair_triton, "cuda")
BACKENDS.append(pytest.param(ON_GPU, id="triton", marks=[pytest.mark.gpu, NO_GPU]))
MAPS = {
    "plain": PLAIN,
    "scaled": (LogitMap(0.7, None, 1.3), LogitMap(1.2, None, -0.8)),
    "softcap": (LogitMap(0.7, 5.0), LogitMap(1.1, 30.0, -1.3)),
    "one_softcap": (LogitMap(), LogitMap(0.9, 6.0, 1.2)),
}
SIZES = [*((128, v) for v in (1, 2, 3, 5, 8, 9, 16, 31, 33, 70)), (32, 257), (32, 1030)]
maps_table = pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
rules_table = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(rows_cpu, "ISA", request.param.isa)
    return request.param


def assert_state(backend: Backend, problem: Problem, over: int | None, entropy: bool) -> Tensor:
    ours = fold(backend.kernels, problem, over, entropy, backend.device)
    eager = whole_state(problem, over, entropy, torch.float32)
    truth = whole_state(problem, over, entropy, torch.float64)
    names = ("max", "mass", "teacher's max", "teacher's mass", "cross", "moment")
    for i, name in enumerate(names):
        assert_as_good(name, ours[i], eager[i], truth[i])
    return ours


def assert_sums(backend: Backend, problem: Problem, rule: P.Rule) -> Tensor:
    constants = make_constants(problem)
    ours = add_up(backend.kernels, problem, rule, constants, backend.device)
    eager = whole_sums(problem, rule, constants, torch.float32)
    truth = whole_sums(problem, rule, constants, torch.float64)
    for i, name in enumerate(("f", "df/ds", "df/dt")):
        # Terms are float32, whatever they are summed in.
        assert_as_good(name, ours[i].float(), eager[i], truth[i])
    return ours


def assert_turn(
    backend: Backend, problem: Problem, rule: P.Rule, dtype: torch.dtype = torch.float32
) -> None:
    constants, factors = make_constants(problem), make_factors(problem.rows)
    ours = turn(
        backend.kernels, problem, rule, constants, factors, dtype=dtype, device=backend.device
    )
    eager = whole_gradients(problem, rule, constants, factors, torch.float32)
    truth = whole_gradients(problem, rule, constants, factors, torch.float64)
    for name, o, e, t in zip(("student", "teacher"), ours, eager, truth, strict=True):
        assert o is not None
        assert_as_good(name, o, e.to(dtype), t)


@maps_table
@pytest.mark.parametrize("over", [None, 0, 1])
def test_state_matches_float64(backend: Backend, over: int | None, maps: Maps) -> None:
    for seed, (n, v) in enumerate(SIZES):
        problem = make_problem(n, v, maps, bias=seed % 2 == 0, seed=seed)
        assert_state(backend, problem, over, entropy=seed % 3 == 2)  # the longest, too


@maps_table
@rules_table
def test_sums_and_gradients_match_float64(backend: Backend, rule: P.Rule, maps: Maps) -> None:
    for seed, (n, v) in enumerate(SIZES):
        problem = make_problem(n, v, maps, bias=seed % 2 == 0, seed=seed)
        assert_sums(backend, problem, rule)
        assert_turn(backend, problem, rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@rules_table
def test_gradients_in_halves(backend: Backend, rule: P.Rule, dtype: torch.dtype) -> None:
    for v in (1, 33, 257):
        assert_turn(backend, make_problem(16, v, MAPS["one_softcap"], seed=v), rule, dtype)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e3])
@rules_table
def test_flat_and_peaked_rows(backend: Backend, rule: P.Rule, spread: float) -> None:
    problem = make_problem(16, 70, spread=spread, seed=5)
    assert_state(backend, problem, 1, entropy=True)
    assert_sums(backend, problem, rule)
    assert_turn(backend, problem, rule)


def test_one_head_is_trained(backend: Backend) -> None:
    problem, rule = make_problem(5, 37, MAPS["softcap"]), RULES["jsd"]
    given = (problem, rule, make_constants(problem), make_factors(5))
    both = turn(backend.kernels, *given, device=backend.device)
    for i in range(2):
        wanted = (i == 0, i == 1)
        found = turn(backend.kernels, *given, wanted=wanted, device=backend.device)
        alone, expected = found[i], both[i]
        assert found[1 - i] is None and alone is not None and expected is not None
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("over", [0, 1])
def test_maxima_that_move_apart(backend: Backend, over: int) -> None:
    """Tile after tile the student's logits rise by hundreds and the teacher's fall, and back."""
    problem = make_problem(8, 33, tiles=4, bias=False, seed=2)
    for i, shift in enumerate((0.0, 300.0, -500.0, 700.0)):
        problem.tiles[0][i].add_(shift)
        problem.tiles[1][i].sub_(shift)
    assert_state(backend, problem, over, entropy=True)
    mirrored = Problem((problem.tiles[1], problem.tiles[0]), (None, None), PLAIN)
    assert_state(backend, mirrored, over, entropy=True)


@pytest.mark.parametrize("heads", [(0,), (1,), (0, 1)], ids=["student", "teacher", "both"])
@rules_table
def test_excluded_words(backend: Backend, rule: P.Rule, heads: tuple[int, ...]) -> None:
    """A bias of -inf: a number for what is infinite, nothing where both heads exclude a word."""
    problem = make_problem(6, 40, seed=3)
    for i in heads:
        bias = problem.biases[i]
        assert bias is not None
        bias[5:37], bias[75:] = -INF, -INF
    for over in (0, 1):
        assert assert_state(backend, problem, over, entropy=True).isfinite().all()
    assert assert_sums(backend, problem, rule).isfinite().all()
    assert_turn(backend, problem, rule)


@rules_table
def test_tiles_that_both_exclude_leave_no_trace(backend: Backend, rule: P.Rule) -> None:
    """Whole tiles at -inf, the first and the last: (-inf) - (-inf) must not poison the row."""
    problem = make_problem(5, 20, tiles=3, seed=4)
    for bias in problem.biases:
        assert bias is not None
        bias[:20], bias[40:] = -INF, -INF
    student, teacher = ([tiles[1]] for tiles in problem.tiles)
    biases = tuple(bias[20:40] for bias in problem.biases if bias is not None)
    alone = Problem((student, teacher), (biases[0], biases[1]), PLAIN)
    kernels, device = backend.kernels, backend.device
    for over in (0, 1):
        found = fold(kernels, problem, over, True, device)
        assert torch.equal(found, fold(kernels, alone, over, True, device))
    constants, factors = make_constants(alone), make_factors(5)
    sums = add_up(kernels, problem, rule, constants, device)
    assert torch.equal(sums, add_up(kernels, alone, rule, constants, device))
    for dx in turn(kernels, problem, rule, constants, factors, device=device):
        assert dx is not None and not dx[:, :20].any() and not dx[:, 40:].any()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", [0, 1])
@rules_table
def test_a_poisoned_product_stays_in_its_row(
    backend: Backend, rule: P.Rule, side: int, bad: float
) -> None:
    kernels, device = backend.kernels, backend.device
    clean = make_problem(4, 37, seed=6)
    poisoned = make_problem(4, 37, seed=6)
    poisoned.tiles[side][0][2, 17] = bad
    factors, found = make_factors(4), []
    for problem in (clean, poisoned):
        state = fold(kernels, problem, side, True, device)
        constants = constants_of(state)
        sums = add_up(kernels, problem, rule, constants, device)
        grads = turn(kernels, problem, rule, constants, factors, device=device)
        found.append([state, sums, *(dx.t() for dx in grads if dx is not None)])
    rows = [0, 1, 3]
    for before, after in zip(*found, strict=True):
        assert torch.equal(after[:, rows], before[:, rows])
    state, sums, *grads = (x[:, 2] for x in found[1])
    assert state[P.MASS + 2 * side].isnan() and state[P.CROSS].isnan()
    assert state[P.MASS + 2 - 2 * side].isfinite()
    assert sums.isnan().any() and grads[side].isnan().all()


def test_a_product_of_minus_infinity_is_an_excluded_word(backend: Backend) -> None:
    problem = make_problem(3, 37, seed=6)
    for tiles in problem.tiles:
        tiles[0][1, 17] = -INF
    for over in (0, 1):
        assert assert_state(backend, problem, over, entropy=True).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@rules_table
def test_no_gradient_where_grad_is_0(backend: Backend, rule: P.Rule, dtype: torch.dtype) -> None:
    """Whatever the row holds, products and constants."""
    problem = make_problem(4, 37, MAPS["one_softcap"], seed=7)
    for tiles in problem.tiles:
        tiles[0][1] = NAN
        tiles[1][2, 3] = INF
    constants, factors = make_constants(problem), make_factors(4)
    constants[:, 1], factors[P.TOTAL, 2] = NAN, INF
    factors[P.GRAD, 1], factors[P.GRAD, 2] = 0.0, -0.0
    how = {"dtype": dtype, "device": backend.device}
    for dx in turn(backend.kernels, problem, rule, constants, factors, **how):
        assert dx is not None and torch.equal(dx[1:3], torch.zeros_like(dx[1:3]))
        assert dx[0].any() and dx[3].any()


@rules_table
def test_probabilities_that_underflow_in_both_heads(backend: Backend, rule: P.Rule) -> None:
    """p = q = 0, and subnormal numbers: terms of 0, no 0·inf."""
    problem = make_problem(32, 40, bias=False, seed=8)
    depths = torch.cat((torch.linspace(85.0, 110.0, 26), torch.tensor([500.0, 1e4, 1e30])))
    for tiles in problem.tiles:
        tiles[1][:, : len(depths)] -= depths
    assert assert_sums(backend, problem, rule).isfinite().all()
    assert_turn(backend, problem, rule)


def cells(s: Tensor, t: Tensor) -> tuple[Problem, Tensor]:
    """A row per pair of log-probabilities: their own constants are 0."""
    column = [[s.unsqueeze(1)], [t.unsqueeze(1)]]
    problem = Problem((column[0], column[1]), (None, None), PLAIN)
    return problem, torch.zeros(P.CONSTANTS, len(s))


def test_the_alpha_exponent_stops_at_40(backend: Backend) -> None:
    s = torch.tensor([-100.0, -50.0, -20.0, -1.0, -1e30])
    t = torch.tensor([-1.0, -0.5, -3.0, -9.0, -1.0])
    problem, constants = cells(s, t)
    sums = add_up(backend.kernels, problem, P.Rule("alpha", 2.0), constants, backend.device)
    e = (2 * t - s).double().clamp_max(40).exp()
    p, q = s.double().exp(), t.double().exp()
    expected = torch.stack(((e + p) / 2 - q, (p - e) / 2, e - q))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-9)
    assert sums[2, 0] == sums[2, 1] == sums[2, 4]


@pytest.mark.parametrize("alpha", NEAR_LIMITS)
def test_alpha_near_its_limits(backend: Backend, alpha: float) -> None:
    assert_near_limit(backend.kernels, alpha, backend.device)


def test_words_both_exclude_have_no_alpha_divergence(backend: Backend) -> None:
    """At any alpha for which α·l + (1 - α)·l is still l."""
    problem, constants = cells(torch.tensor([-1e30, -1e35]), torch.tensor([-1e30, -INF]))
    for alpha in (-3.0, 0.5, 50.0):
        sums = add_up(backend.kernels, problem, P.Rule("alpha", alpha), constants, backend.device)
        assert not sums.any()


def test_tvd_has_no_slope_where_the_heads_agree(backend: Backend) -> None:
    s = torch.tensor([-1.0, -2.0, -3.0, -1e30])
    t = torch.tensor([-1.0, -3.0, -2.0, -1e30])
    problem, constants = cells(s, t)
    sums = add_up(backend.kernels, problem, P.Rule("tvd"), constants, backend.device)
    sign = torch.tensor([0.0, 0.5, -0.5, 0.0], dtype=torch.float64)
    p, q = s.double().exp(), t.double().exp()
    expected = torch.stack((sign * (p - q), sign * p, -sign * q))
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0.0)


@rules_table
def test_no_rows(backend: Backend, rule: P.Rule) -> None:
    problem = make_problem(0, 7)
    assert fold(backend.kernels, problem, 0, True, backend.device).shape == (P.STATE, 0)
    constants, factors = torch.zeros(P.CONSTANTS, 0), torch.zeros(P.FACTORS, 0)
    assert add_up(backend.kernels, problem, rule, constants, backend.device).shape == (P.SUMS, 0)
    for dx in turn(backend.kernels, problem, rule, constants, factors, device=backend.device):
        assert dx is not None and dx.shape == (0, 14)


@NATIVE_MISSING
@rules_table
def test_threads_do_not_change_bits(rule: P.Rule) -> None:
    problem = make_problem(19, 1024, MAPS["softcap"], tiles=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            state = fold(pair_cpu, problem, 1, True)
            constants = constants_of(state)
            sums = add_up(pair_cpu, problem, rule, constants)
            grads = turn(pair_cpu, problem, rule, constants, make_factors(19))
            found.append([state, sums, *(dx for dx in grads if dx is not None)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone, shared) for alone, shared in zip(*found, strict=True))


@NATIVE_MISSING
def test_unsupported_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_cpu, "ISA", len(rows_cpu.ISAS))
    with pytest.raises(RuntimeError, match="pair_softmaxes: isa: expected 0 to"):
        fold(pair_cpu, make_problem(1, 1))

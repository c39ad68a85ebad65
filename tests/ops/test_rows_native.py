"""Compiled row kernels against float64, as good as the float32 ones in PyTorch; one table of cases.

Every instruction set of this processor runs, and CUDA where there is a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from _row_problem import (
    ALL_STATS,
    Problem,
    assert_kept,
    assert_state,
    fold,
    initial_state,
    make_grads,
    make_problem,
    true_turn,
    turn,
)
from torch import Tensor

from fastpo.ops.rows import backend as R
from fastpo.ops.rows import cpu as rows_cpu
from fastpo.ops.rows import cuda as rows_cuda
from fastpo.ops.rows import torch as rows_torch
from fastpo.testing import assert_as_good_as_eager

pytestmark = pytest.mark.skipif(rows_cpu._C is None, reason="fastpo._C is not built")


@dataclass(frozen=True)
class Backend:
    kernels: ModuleType
    device: str
    isa: int = 0


CUDA_MISSING = rows_cuda.unavailable(torch.device("cuda")) or (
    None if torch.cuda.is_available() else "no CUDA device"
)
BACKENDS = [
    pytest.param(Backend(rows_cpu, "cpu", isa), id=name) for isa, name in enumerate(rows_cpu.ISAS)
] + [
    pytest.param(
        Backend(rows_cuda, "cuda"),
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(bool(CUDA_MISSING), reason=str(CUDA_MISSING))],
    )
]

MAPS = [
    pytest.param(R.LogitMap(), id="plain"),
    pytest.param(R.LogitMap(temperature=0.7, logit_scale=1.3), id="scaled"),
    pytest.param(R.LogitMap(temperature=0.7, softcap=5.0), id="softcap"),
    pytest.param(R.LogitMap(softcap=30.0, logit_scale=-1.3), id="softcap-negative"),
]
KEPT = [None, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 3, 5, 8, 9, 16, 31, 33, 70]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(rows_cpu, "ISA", request.param.isa)
    return request.param


def assert_turn(backend: Backend, problem: Problem, kept: torch.dtype | None) -> None:
    grads = make_grads(problem)
    folded = None if kept is None else fold(rows_torch, problem, kept=kept)
    for entropy_grad in (False, True):
        how = {"folded": folded, "entropy_grad": entropy_grad}
        ours = turn(backend.kernels, problem, grads, device=backend.device, **how)
        eager = turn(rows_torch, problem, grads, device=backend.device, **how)
        truth = true_turn(problem, grads, folded, entropy_grad=entropy_grad)
        assert_as_good_as_eager(f"out, kept {kept}", ours, eager, truth)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("logit_map", MAPS)
def test_matches_float64(backend: Backend, logit_map: R.LogitMap, kept: torch.dtype | None) -> None:
    """Forward and backward, ragged widths, label in either tile, all statistics."""
    sizes = [(256, v) for v in WIDTHS] + [(64, 257), (16, 4099)]
    for seed, (n, v) in enumerate(sizes):
        problem = make_problem(n, v, logit_map, bias=seed % 2 == 0, seed=seed)
        for fold_cap in (False, True):
            how = {"kept": kept, "fold_cap": fold_cap}
            ours = fold(backend.kernels, problem, device=backend.device, **how)
            eager = fold(rows_torch, problem, device=backend.device, **how)
            assert_state(problem, ours, eager)
            if kept is not None:
                assert_kept(problem, ours, eager, fold_cap)
        assert_turn(backend, problem, kept)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
def test_extreme_logits(backend: Backend, spread: float) -> None:
    """From nearly uniform rows to one word holding all the mass, everything else underflowing."""
    for kept in KEPT:
        problem = make_problem(64, 70, R.LogitMap(), spread=spread, seed=5)
        ours = fold(backend.kernels, problem, kept=kept, device=backend.device)
        eager = fold(rows_torch, problem, kept=kept, device=backend.device)
        assert_state(problem, ours, eager)
        if kept is not None:
            assert_kept(problem, ours, eager, False)
        assert_turn(backend, problem, kept)


def test_masked_words(backend: Backend) -> None:
    """A bias of -inf removes a word; a label there has log-probability -inf, not NaN."""
    problem = make_problem(6, 40, R.LogitMap(), seed=3)
    assert problem.bias is not None
    problem.bias[5:40] = float("-inf")
    problem.labels[0] = 7
    ours = fold(backend.kernels, problem, kept=torch.float32, device=backend.device)
    eager = fold(rows_torch, problem, kept=torch.float32, device=backend.device)
    assert_state(problem, ours, eager)
    assert ours.state[R.TARGET, 0] == float("-inf")
    assert_kept(problem, ours, eager, False)
    assert_turn(backend, problem, None)
    assert_turn(backend, problem, torch.float32)


def test_a_tile_of_masked_words_leaves_no_trace(backend: Backend) -> None:
    """All words of the first tile at -inf: (-inf) - (-inf) must not poison the row."""
    problem = make_problem(5, 20, R.LogitMap(), seed=4)
    assert problem.bias is not None
    problem.bias[:20] = float("-inf")
    problem.labels.clamp_(20)
    ours = fold(backend.kernels, problem, kept=torch.bfloat16, device=backend.device)
    second = Problem([problem.tiles[1]], problem.labels - 20, problem.bias[20:], R.LogitMap())
    alone = fold(backend.kernels, second, kept=torch.bfloat16, device=backend.device)
    keep = [row for row in range(R.STATE) if row != R.SUM]
    assert torch.equal(ours.state[keep], alone.state[keep])
    assert (ours.kept[0] == 0).all() and torch.equal(ours.kept[1], alone.kept[0])
    # `frozen` rescales by exp(anchor before - anchor), which has to stay a number.
    assert torch.isfinite(ours.anchors[0]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 17, 36])
def test_a_poisoned_product_stays_in_its_row(backend: Backend, bad: float, column: int) -> None:
    """NaN and +inf among the others make OTHERS NaN, -inf is a word without mass."""
    problem = make_problem(4, 37, R.LogitMap(), tiles=1, bias=False, seed=6)
    problem.labels[:] = 20
    clean = fold(backend.kernels, problem, device=backend.device).state
    problem.tiles[0][2, column] = bad
    ours = fold(backend.kernels, problem, device=backend.device).state
    eager = fold(rows_torch, problem, device=backend.device).state
    assert torch.equal(ours.isnan(), eager.isnan())
    assert ours[R.OTHERS, 2].isnan() == (bad != float("-inf"))
    rows = [0, 1, 3]
    assert torch.equal(ours[:, rows], clean[:, rows])


def test_nan_at_the_label_poisons_its_row(backend: Backend) -> None:
    problem = make_problem(3, 37, R.LogitMap(), tiles=1, seed=6)
    problem.tiles[0][1, problem.labels[1]] = float("nan")
    ours = fold(backend.kernels, problem, kept=torch.bfloat16, device=backend.device)
    assert ours.state[[R.MAX, R.OTHERS, R.TARGET], 1].isnan().all()
    assert not ours.state[:, [0, 2]].isnan().any()
    others = ours.kept[0][1].clone()
    others[problem.labels[1]] = float("nan")
    assert others.isnan().all()
    grads = make_grads(problem).nan_to_num()
    out = turn(backend.kernels, problem, grads, folded=ours, device=backend.device)
    assert out[1].isnan().sum() == 36 and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("label", [-100, -1, 74, 2**62, -(2**62)])
def test_label_outside_the_tiles(backend: Backend, label: int) -> None:
    """TARGET stays NaN; every column is one of the others."""
    problem = make_problem(64, 37, R.LogitMap(), seed=7)
    problem.labels[:] = label
    ours = fold(backend.kernels, problem, device=backend.device)
    assert ours.state[R.TARGET].isnan().all()
    assert_state(problem, ours, fold(rows_torch, problem, device=backend.device))
    assert_turn(backend, problem, None)


@pytest.mark.parametrize("stats", [*R.STATS.values(), 0])
def test_statistics_fold_only_when_asked(backend: Backend, stats: int) -> None:
    problem = make_problem(3, 70, R.LogitMap(), seed=8)
    ours = fold(backend.kernels, problem, stats=stats, device=backend.device).state
    everything = fold(backend.kernels, problem, device=backend.device).state
    fields = dict(zip(R.STATS.values(), (R.MOMENT, R.SQUARES, R.SUM, R.BEFORE), strict=True))
    untouched = initial_state(3)
    for bit, field in fields.items():
        assert torch.equal(ours[field], (everything if stats & bit else untouched)[field])
    for field in (R.MAX, R.OTHERS, R.TARGET):
        assert torch.equal(ours[field], everything[field])


def test_ties_go_to_the_first_word(backend: Backend) -> None:
    """BEFORE equals TARGET when an earlier word has the label's logit, or both saturate."""
    for logit_map in (R.LogitMap(), R.LogitMap(softcap=2.0)):
        tile = torch.full((1, 33), -1.0)
        tile[0, [4, 20]] = 500.0
        for label, tied in ((4, False), (20, True)):
            problem = Problem([tile], torch.tensor([label]), None, logit_map)
            state = fold(backend.kernels, problem, device=backend.device).state
            assert state[R.TARGET] == state[R.MAX]
            assert (state[R.BEFORE] == state[R.TARGET]) == tied


def test_in_place(backend: Backend) -> None:
    """`kept` may be the tile, `out` may be the source: the same bits as apart."""
    problem = make_problem(5, 70, R.LogitMap(softcap=20.0), tiles=1, seed=9)
    apart = fold(backend.kernels, problem, kept=torch.float32, device=backend.device)
    moved = problem.to(backend.device)
    tile, anchors = moved.tiles[0], torch.empty(5, device=backend.device)
    state, logit_map = initial_state(5, backend.device), problem.logit_map
    backend.kernels.forward(
        tile, 0, moved.labels, moved.bias, state, logit_map, ALL_STATS, tile, anchors, False
    )
    assert torch.equal(tile.cpu(), apart.kept[0])
    assert torch.equal(state.cpu(), apart.state)
    grads = make_grads(problem)
    expected = turn(backend.kernels, problem, grads, folded=apart, device=backend.device)
    grads = grads.to(backend.device)
    backend.kernels.backward(tile, anchors, 0, moved.labels, None, grads, logit_map, True, tile)
    assert torch.equal(tile.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_round_as_torch(backend: Backend, dtype: torch.dtype) -> None:
    """Every 16-bit pattern is read exactly; stores round to nearest even, NaN stays NaN."""
    g = torch.Generator().manual_seed(0)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    grads = torch.zeros(R.GRADS, 1)
    grads[R.COMMON] = 1.0  # out = kept·exp(0 - 0 - 0)·1
    noise = torch.randint(-(2**31), 2**31 - 1, (200_003,), generator=g, dtype=torch.int32)
    for source in (values, noise.view(torch.float32)):
        for out in (torch.float32, torch.bfloat16, torch.float16):
            written = torch.empty(1, len(source), dtype=out, device=backend.device)
            backend.kernels.backward(
                source.unsqueeze(0).to(backend.device),
                torch.zeros(1, device=backend.device),
                0,
                torch.tensor([-1], device=backend.device),
                None,
                grads.to(backend.device),
                R.LogitMap(),
                False,
                written,
            )
            expected = source.float().to(out)
            same = (written[0].cpu() == expected) | (written[0].cpu().isnan() & expected.isnan())
            assert same.all(), (source.dtype, out, source[~same][:5])


def ulps(value: Tensor, truth: Tensor) -> float:
    """Largest error in units in the last place of float32, subnormal numbers included."""
    exponent = torch.frexp(truth.double())[1].clamp_min(-125) - 24
    return ((value.double() - truth.double()).abs() / torch.exp2(exponent.double())).max().item()


def test_exp_is_exact_to_two_ulps(backend: Backend) -> None:
    x = torch.cat([torch.linspace(-105, 0, 300_001), -torch.logspace(-8, 2, 100_000)])
    x = torch.cat([x, torch.tensor([0.0, -104.0, -1e4, -1e38, float("-inf")])])
    problem = Problem([x.unsqueeze(0)], torch.tensor([-1]), None, R.LogitMap())
    folded = fold(backend.kernels, problem, kept=torch.float32, device=backend.device)
    assert folded.anchors[0] == 0.0
    assert ulps(folded.kept[0][0], x.double().exp()) <= 2
    assert (folded.kept[0][0, -4:] == 0).all()


def test_x_log_x_is_exact_to_two_ulps(backend: Backend) -> None:
    x = torch.cat([torch.linspace(1e-6, 0.9999, 300_001), torch.logspace(-44, 0, 100_000)[:-1]])
    out, grads = torch.empty(1, len(x), device=backend.device), torch.zeros(R.GRADS, 1)
    grads[R.ENTROPY] = -1.0
    label, anchors = torch.tensor([-1]), torch.zeros(1)
    kept, anchors, label, grads = (
        t.to(backend.device) for t in (x.unsqueeze(0), anchors, label, grads)
    )
    backend.kernels.backward(kept, anchors, 0, label, None, grads, R.LogitMap(), True, out)
    assert ulps(out[0].cpu(), torch.special.xlogy(x.double(), x.double())) <= 2


def test_softcap_is_exact_to_1e_6(backend: Backend) -> None:
    x = torch.cat([torch.logspace(-9, 2, 30_001), -torch.logspace(-9, 2, 30_001)])
    problem = Problem(
        [x.unsqueeze(1)], torch.zeros(len(x), dtype=torch.int64), None, R.LogitMap(softcap=1.0)
    )
    target = fold(backend.kernels, problem, device=backend.device).state[R.TARGET].double()
    truth = x.double().tanh()
    assert ((target - truth) / truth).abs().max() < 3e-7


def test_no_rows(backend: Backend) -> None:
    for logit_map in (R.LogitMap(), R.LogitMap(softcap=3.0)):
        problem = make_problem(0, 7, logit_map)
        folded = fold(backend.kernels, problem, kept=torch.bfloat16, device=backend.device)
        assert folded.state.shape == (R.STATE, 0)
        grads = torch.zeros(R.GRADS, 0)
        out = turn(backend.kernels, problem, grads, folded=folded, device=backend.device)
        assert out.shape == (0, 14)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_threads_do_not_change_bits(two_threads: None) -> None:
    problem = make_problem(67, 2048, R.LogitMap(softcap=9.0), tiles=1)
    grads = make_grads(problem)
    shared = fold(rows_cpu, problem, kept=torch.bfloat16)
    shared_out = turn(rows_cpu, problem, grads, folded=shared)
    torch.set_num_threads(1)
    alone = fold(rows_cpu, problem, kept=torch.bfloat16)
    assert torch.equal(shared.state, alone.state)
    assert torch.equal(shared.kept[0], alone.kept[0])
    assert torch.equal(shared_out, turn(rows_cpu, problem, grads, folded=alone))


def test_one_thread_pool(two_threads: None) -> None:
    """The kernels' OpenMP runtime is the one torch brought, not a second pool beside it."""
    fold(rows_cpu, make_problem(64, 1024, R.LogitMap()))
    try:
        with open("/proc/self/maps") as maps:
            names = {line.split()[-1] for line in maps if "libgomp" in line}
    except FileNotFoundError:
        pytest.skip("no /proc")
    assert len(names) == 1, names


def test_unsupported_instruction_set() -> None:
    assert rows_cpu._C is not None
    empty = rows_cpu.forward_tile(
        torch.zeros(1, 1),
        0,
        torch.zeros(1, dtype=torch.int64),
        None,
        initial_state(1),
        R.LogitMap(),
        0,
        None,
        None,
        False,
    )
    best = len(rows_cpu.ISAS) - 1
    for missing in (-1, best + 1):
        expected = rf"isa: expected 0 to {best} \({rows_cpu.ISAS[-1]}\) here, got {missing}"
        with pytest.raises(RuntimeError, match=expected):
            rows_cpu._C.rows_forward_cpu(empty, 1, missing)


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert rows_cpu.unavailable(cpu) is None
    assert "expected a CPU tensor, got device cuda:0" in str(rows_cpu.unavailable(cuda))
    assert "expected a CUDA tensor, got device cpu" in str(rows_cuda.unavailable(cpu))
    for module, device in ((rows_cpu, cpu), (rows_cuda, cuda)):
        monkeypatch.setattr(module, "_C", None)
        monkeypatch.setattr(module, "_MISSING", "fastpo._C is not there; build it with `pip`")
        assert "build it with" in str(module.unavailable(device))

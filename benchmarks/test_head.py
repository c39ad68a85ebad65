"""`linear_logps` in every mode on every backend that is there, and eager logits beside it."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from fastpo.bench.check import Judge, judge
from fastpo.bench.head import Problem, make_problem
from fastpo.bench.shapes import Shape
from fastpo.bench.variants import Variant, own_variants, plain_variants, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}[DEVICE]
SHAPES = {
    "cuda": (Shape(8192, 128_256, 4096), Shape(8192, 151_936, 896)),
    "cpu": (Shape(256, 32_768, 512), Shape(1024, 8192, 512)),
}[DEVICE]
VARIANTS = [*own_variants(torch.device(DEVICE)), *plain_variants()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = (Shape(12, 100, 8),) if metafunc.config.getoption("tiny") else SHAPES
    metafunc.parametrize("shape", shapes, ids=str)


@functools.lru_cache(maxsize=1)
def problem_of(shape: Shape) -> tuple[Problem, Judge]:
    problem = make_problem(shape, DEVICE, DTYPE, copies=True)
    return problem, judge(problem.sets[0], problem.upstream)


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if not v.compiles],
    ids=lambda variant: f"{variant.name}-{variant.case}",
)
def test_head(benchmark, shape: Shape, variant: Variant) -> None:
    try:
        forward = variant.make()
    except RuntimeError as error:
        pytest.skip(str(error))
    problem, judged = problem_of(shape)
    result = run(variant, forward, problem.sets[0], problem.upstream)
    if variant.own:
        assert judged.complaint(judged.errors(result), DTYPE) is None
    del result
    benchmark.group = f"{shape}, {variant.case}"
    # Equal inputs in turns, more than a cache holds.
    inputs = itertools.cycle(problem.sets)

    def setup() -> tuple[tuple, dict]:
        return (variant, forward, next(inputs), problem.upstream), {}

    benchmark.pedantic(run, setup=setup, rounds=5, warmup_rounds=1)

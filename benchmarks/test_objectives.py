"""Every objective with its gradient, and the formula as its paper writes it, which may loop."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _objective_truth import ROWS, make_inputs
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastpo import objectives
from fastpo.objectives import _quantities
from fastpo.objectives._registry import quantities_of

for module in Path(__file__).parents[1].glob("tests/objectives/_objective_truth_*.py"):
    importlib.import_module(module.stem)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"B": 16, "N": 16, "T": 256}
Inputs = dict[str, Tensor]


@functools.lru_cache(maxsize=2)
def inputs_of(key: str, tiny: bool) -> Inputs:
    """float32 on the device; what the objective differentiates are leaves."""
    row, function = ROWS[key], objectives.get(key)
    # A dimension that cannot be any number stays.
    sizes = {**({} if tiny else SIZES), **row.sizes}
    needed = {n for n, required in quantities_of(function).items() if required or n in row.always}
    carriers = _quantities.DIFFERENTIABLE | set(row.gradient_into)
    made = {}
    for name, x in make_inputs(function, forms=row.forms, **sizes).items():
        if name in needed:
            x = (x.float() if x.is_floating_point() else x).to(DEVICE)
            made[name] = x.requires_grad_(name in carriers and x.is_floating_point())
    return made


def formula(key: str) -> Callable[..., Any]:
    """By the objective's names for what it takes."""
    function = ROWS[key].function
    theirs = inspect.signature(function).parameters
    names = dict(zip(quantities_of(objectives.get(key)), theirs, strict=False))
    return lambda **given: function(**{names[name]: x for name, x in given.items()})


def step(function: Callable[..., Any], inputs: Inputs) -> tuple[list[Tensor], tuple]:
    outputs = tree_leaves(function(**inputs))
    total = sum(x.sum() for x in outputs)
    leaves = [x for x in inputs.values() if x.requires_grad]
    if not (leaves and total.requires_grad):
        return outputs, ()
    return outputs, torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("of", ["fastpo", "formula"])
@pytest.mark.parametrize("key", objectives.available())
@pytest.mark.benchmark(max_time=0.05, min_rounds=3)
def test_objective(benchmark, request, key: str, of: str) -> None:
    inputs = inputs_of(key, request.config.getoption("tiny"))
    function = objectives.get(key) if of == "fastpo" else formula(key)
    outputs, _ = step(function, inputs)
    for ours, theirs in zip(outputs, step(formula(key), inputs)[0], strict=True):
        torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-3, atol=1e-3)
    benchmark.group = key
    benchmark(step, function, inputs)

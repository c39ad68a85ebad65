"""Random calls of every primitive in random ways, each judged against float64 by the house's rule.

A few examples here; `make fuzz` runs as many as it is told, and prints the seed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from _fuzz_calls import Call, Named, Problem, Size, fused, laid, slow
from _fuzz_draws import NAMES, Way, calls, ways
from _primitives import PRIMITIVES
from _probes import COMPARING
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastpo import planner
from fastpo.testing import assert_as_good_as_eager

DIFFERENTIABLE = ("logps", "entropy", "lse", "divergence", "values")


pytestmark = pytest.mark.usefixtures("group")


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_as_its_twin(name, data):
    judge(call := data.draw(calls(name)), data.draw(ways(call)))


# Seconds each.
@settings(max_examples=max(2, settings.default.max_examples // 1000))
@given(data=st.data())
def test_compiled(data):
    call = data.draw(st.sampled_from(NAMES).flatmap(calls))
    judge(call, replace(data.draw(ways(call)), mode="grad", route="compiled"))


@pytest.mark.parametrize("backend", ["cpu", "anchored"])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_negated_view_has_its_sign(name, backend):
    """As the imaginary part of a conjugate is one: memory holds the other sign."""
    call = replace(PRIMITIVES[name], trained=())
    leaves = call.leaves()
    negated = {n: torch._neg_view(-x) for n, x in leaves.items() if x.is_floating_point()}
    for found, expected in zip(
        call.outputs(leaves | negated, backend=backend),
        call.outputs(leaves, backend=backend),
        strict=True,
    ):
        assert torch.equal(found, expected)


def judge(call: Call, way: Way) -> None:
    problem = Problem(call)
    leaves, fixed = arranged(problem)
    before = {name: x.detach().clone() for name, x in leaves.items()}
    with tiles(way.tiles):
        outputs, passes = made(problem, way, leaves, fixed)
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(), leaves[name].detach().nan_to_num()), f"{name} changed"
    compare(problem, way, outputs, passes)


def arranged(problem: Problem) -> tuple[Named, Named]:
    """Tensors as the call lays them out, NaN where nobody may look."""
    call, leaves = problem.call, {}
    layouts = {
        name + str(i or ""): layout
        for i, side in enumerate(call.sides)
        for name, layout in zip(("hidden", "weight", "bias"), side.layouts, strict=True)
    }
    for name, x in problem.leaves.items():
        layout = layouts.get(name, "plain")
        if name.startswith("hidden") and layout != "expanded":
            x = x.masked_fill(problem.ignored.unsqueeze(-1), float("nan"))
            if call.broken is not None:
                x[problem.broken, ..., 0] = call.broken
        leaves[name] = laid(x, layout).requires_grad_(name in call.trained)
    fixed = dict(problem.fixed)
    for name in ("listed", "coefficients"):
        fixed[name] = fixed[name].masked_fill(problem.ignored.unsqueeze(-1), float("nan"))
    fixed = {name: laid(x, call.label_layout) for name, x in fixed.items()}
    return leaves, fixed


@contextlib.contextmanager
def tiles(size: tuple[int, int] | None) -> Iterator[None]:
    if size is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "tile_shape", lambda *_, **__: planner.Tiles(*size))
        yield


def made(
    problem: Problem, way: Way, leaves: Named, fixed: Named
) -> tuple[Named, list[tuple[int, Named]]]:
    """Outputs, and the gradients of each pass with the number of its factors."""
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with modes.get(way.mode, torch.enable_grad)(), forward_of(way):
        outputs = through(way, lambda: fused(problem.call, leaves, fixed))
    trained = {name: x for name, x in leaves.items() if name in reached(problem.call)}
    if way.mode != "grad" or not trained:
        assert not any(x.requires_grad for x in outputs.values())
        return outputs, []
    last = {name: outputs[name] for name in followed(problem.call, outputs)}
    assert all(x.requires_grad for x in last.values())
    if not last:
        return outputs, []
    with autocast(way, way.autocast is not None and way.autocast[1]):
        return outputs, list(gradients(problem, way, last, trained))


def followed(call: Call, outputs: Named) -> list[str]:
    """Outputs with a gradient, of those that were asked for."""
    wanted = call.options.get("outputs", ()) or ("values", "lse", "divergence")
    wanted = {*wanted, "logps"} if call.name == "adapted" else {*wanted}
    constant = {"entropy"} if call.name == "linear_divergence" else set()
    return [name for name in DIFFERENTIABLE if name in outputs and name in wanted - constant]


def reached(call: Call) -> set[str]:
    """Leaves that the gradient reaches."""
    teacher = not call.options.get("teacher_grad", True)
    return {name for name in call.trained if not (teacher and name.endswith("1"))}


def autocast(way: Way, inside: bool = True) -> contextlib.AbstractContextManager:
    if way.autocast is None or not inside:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, way.autocast[0]))


@contextlib.contextmanager
def forward_of(way: Way) -> Iterator[None]:
    hooks = {
        "identity": lambda: saved_tensors_hooks(lambda x: x, lambda x: x),
        "clone": lambda: saved_tensors_hooks(torch.clone, torch.clone),
        "cpu": save_on_cpu,
    }
    with autocast(way), hooks.get(way.route, contextlib.nullcontext)():
        yield


def through(way: Way, function: Callable[[], Named]) -> Named:
    if way.route == "checkpoint" and way.mode == "grad":
        return checkpoint(function, use_reentrant=False)
    if way.route == "compiled":
        torch.compiler.reset()
        return torch.compile(function, backend=COMPARING)()
    return function()


def factors(problem: Problem, way: Way, outputs: Named, number: int) -> Named:
    """Of the loss; those of a sum have no stride."""
    if way.sums:
        return {name: torch.ones(()).expand_as(x) for name, x in outputs.items()}
    return problem.factors(outputs, number)


def gradients(
    problem: Problem, way: Way, outputs: Named, trained: Named
) -> Iterator[tuple[int, Named]]:
    def one(number: int, retain: bool = False, names: tuple[str, ...] | None = None):
        weighed = list(factors(problem, way, outputs, number).values())
        leaves = trained if names is None else {name: trained[name] for name in names}
        found = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), weighed, retain_graph=retain
        )
        return number, dict(zip(leaves, found, strict=True))

    if way.route == "threads":
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(lambda number: one(number, True), range(2))
    elif way.route in ("twice", "apart"):
        first = tuple(trained) if way.route == "twice" else tuple(trained)[-1:]
        found = one(0, True, first)
        yield from (one(1), found)
    elif way.route == "leaf":
        weighed = factors(problem, way, outputs, 0)
        torch.autograd.backward(list(outputs.values()), list(weighed.values()))
        yield 0, {name: x.grad for name, x in trained.items()}
    else:
        yield one(0)


def dtype_of(call: Call, way: Way, name: str) -> torch.dtype:
    """What eager products with this leaf would run in."""
    if way.autocast is not None:
        return getattr(torch, way.autocast[0])
    suffix = int(name[-1]) if name[-1].isdigit() else 0
    return getattr(torch, call.sides[suffix].dtypes[0])


def twin(
    problem: Problem, way: Way, leaves: Named, ids: Tensor | None, numbers: list[int]
) -> tuple[Named, list[Named]]:
    """Outputs of the slow twin, and the gradients of each pass."""
    call, passes = problem.call, []
    leaves = {name: x.detach().requires_grad_(name in call.trained) for name, x in leaves.items()}
    outputs = slow(call, leaves, problem.fixed, ids)
    trained = {name: x for name, x in leaves.items() if name in reached(call)}
    last = {name: outputs[name] for name in followed(call, outputs)}
    for number in numbers:
        weighed = factors(problem, way, last, number)
        total = sum((x * weighed[name].to(x)).sum() for name, x in last.items())
        found = torch.autograd.grad(
            total, list(trained.values()), retain_graph=True, allow_unused=True
        )
        pairs = zip(trained.items(), found, strict=True)
        passes.append({name: torch.zeros_like(x) if g is None else g for (name, x), g in pairs})
    return outputs, passes


def compare(problem: Problem, way: Way, outputs: Named, passes: list[tuple[int, Named]]) -> None:
    call, numbers = problem.call, [number for number, _ in passes]
    ids = outputs["ids"].clone() if "ids" in outputs else None
    if ids is not None:
        check_list(problem, outputs)
        outputs = {"values": outputs["values"], "lse": outputs["lse"], "best": outputs["values"]}
    wide = {name: x.double() for name, x in problem.leaves.items()}
    narrow = {name: x.to(dtype_of(call, way, name)) for name, x in problem.leaves.items()}
    truth, truths = twin(problem, way, wide, ids, numbers)
    eager, eagers = twin(problem, way, narrow, ids, numbers)
    sound, size = ~problem.broken, Size.of(problem, truth)
    for name, value in outputs.items():
        assert value.shape[: len(call.shape)] == call.shape, name
        others = eager[name], truth[name]
        if name == "is_top1":
            assert value.dtype == torch.bool
            sure = sound & (others[0] == others[1])
            # Words that are all the same, or all at the cap, hang by their last place.
            caps = [call.options.get("softcap"), *call.options.get("softcaps", ())]
            if any(caps) or any(side.layouts[1] == "expanded" for side in call.sides):
                continue
            assert torch.equal(value[sure], others[1][sure].bool()), name
        else:
            assert value.dtype == torch.float32, name
            check(name, *(x[sound] for x in (value, *others)), slack=size.values)
            check_broken(problem, name, value)
    for (number, grads), *others in zip(passes, eagers, truths, strict=True):
        weighed = factors(problem, way, {n: outputs[n] for n in followed(call, outputs)}, number)
        for name, value in grads.items():
            assert value.dtype == problem.leaves[name].dtype, name
            compared = [value, *(other[name] for other in others)]
            if problem.broken.any():
                if not name.startswith("hidden"):
                    continue  # all rows are in it
                compared = [x[sound] for x in compared]
            slack = size.gradient(name, weighed, dtype_of(call, way, name))
            check(f"d {name}", *compared, slack=slack)


def check(name: str, value: Tensor, eager: Tensor, truth: Tensor, *, slack: float) -> None:
    """The rule; and finite is finite, however far eager goes."""
    there = truth.isfinite() & (truth.abs() < torch.finfo(value.dtype).max / 2)
    assert value[there].isfinite().all(), f"{name}: {value}, expected {truth}"
    assert_as_good_as_eager(name, value, eager, truth, slack=slack)


def check_broken(problem: Problem, name: str, value: Tensor) -> None:
    """NaN in its rows where the logits are, which a soft-cap or a scale of 0 may prevent."""
    if math.isnan(problem.call.broken or 0.0):
        assert value[problem.broken].isnan().all(), name


def check_list(problem: Problem, outputs: Named) -> None:
    call, values, ids = problem.call, outputs["values"], outputs["ids"]
    scored = ~problem.ignored & ~problem.broken
    values, ids = values[scored], ids[scored]
    assert (values.diff(dim=-1) <= 0).all()
    assert ((ids >= 0) & (ids < call.vocab)).all()
    assert all(len(set(row)) == call.listed for row in ids.tolist())
    if call.options["excluded"]:
        assert (ids != problem.fixed["exclude"][scored].unsqueeze(-1)).all()

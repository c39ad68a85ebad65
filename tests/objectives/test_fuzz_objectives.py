"""Every objective over its ranges: finite everywhere, and its truth where that is stable."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _objective_truth import ROWS, SIZES, G, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import KEYS, evaluate, truth_of
from torch import Tensor

from fastpo import objectives
from fastpo.objectives._parameters import Interval, OneOf, Parameter
from fastpo.objectives._registry import lookup, quantities_of

# There are 140 of them.
some = settings(max_examples=max(2, settings.default.max_examples // 10))


@dataclass(frozen=True)
class Spread:
    """How far numbers are drawn. least: the distance from a bound that is left out of a range."""

    least: float
    largest: float
    extreme: bool


# Quotients by less are none that float32 holds.
WIDE = Spread(1e-3, 1e3, extreme=True)
# The truth is naive: it exponentiates and subtracts.
TYPICAL = Spread(0.1, 3.0, extreme=False)


def admitted(parameter: Parameter, spread: Spread) -> st.SearchStrategy[Any]:
    values: st.SearchStrategy[Any]
    within = parameter.range
    if isinstance(within, OneOf):
        values = st.sampled_from(list(within))
    elif parameter.kind is bool:
        values = st.booleans()
    elif parameter.kind is int:
        assert isinstance(within, Interval)
        values = st.integers(int(within.low), int(min(within.high, 8)))
    else:
        assert isinstance(within, Interval)
        low, high = max(within.low, -spread.largest), min(within.high, spread.largest)
        low = low + spread.least if within.bounds[0] == "(" else low
        high = high - spread.least if within.bounds[1] == ")" else high
        values = st.floats(low, high, allow_subnormal=False)
    if parameter.kind is not None and parameter.kind.__name__ == "Sequence":
        values = st.lists(values, min_size=1, max_size=3)
    return values | st.none() if parameter.optional else values


@st.composite
def problems(draw: st.DrawFn, key: str, spread: Spread):
    """Quantities by name and hyperparameters: what is optional may be left out."""
    row, function = ROWS[key], objectives.get(key)
    rows = draw(st.sampled_from([6, 1, 2, 3, 0] if spread.extreme else [6, 1, 2, 3]))
    sizes = {**SIZES, **dict.fromkeys("BNMUP", rows), "T": draw(st.sampled_from([5, 1, 2]))}
    inputs = make_inputs(
        function,
        forms=row.forms,
        seed=draw(st.integers(0, 2**16)),
        extreme=spread.extreme,
        **{**sizes, **row.sizes},
    )
    optional = [name for name, required in quantities_of(function).items() if not required]
    left_out = draw(st.sets(st.sampled_from(optional))) if optional else set()
    inputs = {n: x for n, x in inputs.items() if n not in left_out or n in row.always}
    hyper = {}
    for name, parameter in lookup(key).parameters.items():
        values = st.sampled_from([None, G]) if name == "num_groups" else admitted(parameter, spread)
        if draw(st.booleans()):
            hyper[name] = draw(values)
    return inputs, hyper


def widened(inputs: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Lists of log-probabilities stay lists, and shares stay shares."""
    kept = ("soft_labels", "user_weights", "topk_logps")
    return {
        name: x * factor if x.is_floating_point() and not name.endswith(kept) else x
        for name, x in inputs.items()
    }


def documented(error: Exception) -> bool:
    """What two quantities, or a quantity and a parameter, cannot be together."""
    return re.match(r"[\w, .]+: expected .+", str(error), re.DOTALL) is not None


@pytest.mark.parametrize("key", KEYS)
@given(data=st.data())
@some
def test_finite(key, data):
    """Quantities up to 10^4, lengths from 0 on, parameters over their whole range."""
    inputs, hyper = data.draw(problems(key, WIDE))
    inputs = widened(inputs, data.draw(st.sampled_from([1.0, 20.0, 1e-3])))
    # Gradients of float16 end at 65504.
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    try:
        rows, grads = evaluate(objectives.get(key, **hyper), ROWS[key], inputs, {}, dtype)
    except ValueError as error:
        if not documented(error):
            raise
        return
    for name, x in [("rows", x) for x in rows] + list(grads.items()):
        assert x.isfinite().all(), f"{name}: {x}"


BEYOND = 1e15  # exponentials end at e**40, which a parameter may divide


@pytest.mark.parametrize("key", KEYS)
@given(data=st.data())
@some
def test_as_the_truth(key, data):
    inputs, hyper = data.draw(problems(key, TYPICAL))
    function, row = objectives.get(key), ROWS[key]
    try:
        ours, dours = evaluate(function, row, inputs, hyper)
    except ValueError as error:
        if not documented(error):
            raise
        return
    truth, dtruth = truth_of(function, row, inputs, hyper)
    if not all((x.abs() < BEYOND).all() for x in (*truth, *dtruth.values())):
        return  # the naive formula has overflowed, or ours has stopped
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-7, atol=1e-9)
    for name in dtruth.keys() | dours.keys():
        zero = torch.zeros_like(inputs[name])
        got, expected = dours.get(name, zero), dtruth.get(name, zero)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8, msg=name)

"""Any value for any option, any tensor for any argument: taken, or refused by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np
import pytest
import torch
from _primitives import PRIMITIVES, V
from hypothesis import given
from hypothesis import strategies as st

import fastpo
from fastpo.ops.shards.gathered import HeadOptions

FUNCTIONS = {name: getattr(fastpo, name) for name in PRIMITIVES if name != "fastpo"}
FUNCTIONS["fastpo"] = HeadOptions
# A group is torch.distributed's to refuse; who is named in errors is anybody.
LEFT_OUT = ("group", "name", "shard")


def options_of(name: str) -> list[str]:
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    kinds = (inspect.Parameter.KEYWORD_ONLY,) if name != "fastpo" else tuple(inspect._ParameterKind)
    return [x.name for x in parameters if x.kind in kinds and x.name not in LEFT_OUT]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.complex_numbers()
    | st.fractions()
    | st.decimals()
    | st.sampled_from(["cpu", "torch", "logps", "lse", "jsd", "", b"cpu"])
    | st.sampled_from([np.float32(0.5), np.int64(3), np.bool_(True), np.ones(()), np.ones(2)])
    | st.sampled_from([object(), ..., float, Fraction(1, 3), 2**63, -(2**63) - 1, 1e-320, 10**400])
)
DTYPES = [torch.float64, torch.float32, torch.int64, torch.int32, torch.bool, torch.complex64]
TENSORS = st.builds(
    lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
    st.lists(st.integers(0, 3) | st.sampled_from([7, 8, V]), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from(["cpu", "cpu", "meta"]),
)
STRANGE = st.sampled_from(
    [
        torch.zeros(7, 8).to_sparse(),
        torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(4, 8)]),
        torch.zeros(7, 8).to_mkldnn(),
    ]
)
VALUES = (
    SCALARS
    | TENSORS
    | st.lists(SCALARS | TENSORS, max_size=3).flatmap(
        lambda values: st.sampled_from([values, tuple(values)])
    )
)


pytestmark = pytest.mark.usefixtures("group")


def said(function: Callable[[], object]) -> str | None:
    """The sentence of a refusal."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def named(sentence: str | None, names: Iterable[str]) -> bool:
    """One of what, of which name, was expected, and what came; of a head, or of none."""
    start = rf"(head \d: )?({'|'.join(names)}): expected .+"
    return sentence is None or re.match(start, sentence, re.DOTALL) is not None


# Options whose value another argument then does not fit, or that are said as those of one head.
OTHERS = {
    "biases": "bias",
    "ignore_index": "labels",
    "logit_scales": "logit_scale",
    "softcaps": "softcap",
    "vocab": "first",
}


@pytest.mark.parametrize("name", PRIMITIVES)
@given(data=st.data(), value=VALUES)
def test_an_option(name, data, value):
    call, option = PRIMITIVES[name], data.draw(st.sampled_from(options_of(name)))
    sentence = said(lambda: call.outputs(call.leaves(), **{option: value}))
    assert named(sentence, (option, OTHERS.get(option, option)))


@pytest.mark.parametrize("name", [name for name in PRIMITIVES if name != "fastpo"])
@given(data=st.data(), value=TENSORS | STRANGE | SCALARS)
def test_a_tensor(name, data, value):
    call = PRIMITIVES[name]
    leaf = data.draw(st.sampled_from(sorted(call.leaves())))
    assert named(said(lambda: call.outputs(call.leaves() | {leaf: value})), (r"\w+",))

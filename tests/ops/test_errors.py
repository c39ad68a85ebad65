"""Bad input never gives a number: each mistake has its own sentence, said before any work."""

from __future__ import annotations

import pytest
import torch
from _primitives import CALLS, OPERATORS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastpo

H, V = 4, 10


def arguments(**changes):
    given = {
        "hidden": torch.zeros(3, H),
        "weight": torch.zeros(V, H),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    return given | changes


TABLE = [
    ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: expected shape \(3,\), got \(2,\)"),
    ({"labels": torch.zeros(3, dtype=torch.int32)}, r"labels: expected dtype torch.int64, got"),
    (
        {"labels": torch.tensor([0, V, 1])},
        r"labels: expected values in \[0, 10\).*, got 10 at row 1",
    ),
    ({"labels": torch.tensor([0, 1, -7])}, r"got -7 at row 2"),
    ({"labels": torch.tensor([0, -100, 1]), "ignore_index": None}, r"\[0, 10\), got -100 at row 1"),
    ({"weight": torch.zeros(V, H + 1)}, r"weight: expected shape \(V, 4\), got \(10, 5\)"),
    ({"weight": torch.zeros(V)}, r"weight: expected shape \(V, 4\), got \(10,\)"),
    ({"weight": torch.zeros(0, H)}, r"weight: expected shape \(V, 4\), got \(0, 4\)"),
    (
        {"hidden": torch.zeros(3, H, dtype=torch.float64)},
        r"hidden: expected dtype float32, .*float64",
    ),
    ({"weight": torch.zeros(V, H, dtype=torch.int32)}, r"weight: expected dtype float32, .*int32"),
    ({"weight": torch.zeros(V, H).to_sparse()}, r"weight: .* dense tensor, got a torch.sparse_coo"),
    ({"labels": torch.nested.nested_tensor([torch.zeros(3)])}, r"labels: .*, got a nested one"),
    ({"hidden": torch.tensor(0.0)}, r"hidden: expected shape \(\.\.\., H\), got \(\)"),
    ({"bias": torch.zeros(V + 1)}, r"bias: expected shape \(10,\), got \(11,\)"),
    ({"bias": torch.zeros(V, dtype=torch.float64)}, r"bias: expected dtype float32"),
    ({"weight": torch.zeros(V, H, device="meta")}, r"weight: expected device cpu, got meta"),
    ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, r"labels: expected device cpu"),
    ({"temperature": 0.0}, r"temperature: expected a finite number > 0, got 0.0"),
    ({"temperature": float("nan")}, r"temperature: expected a finite number > 0, got nan"),
    ({"temperature": float("inf")}, r"temperature: expected a finite number > 0, got inf"),
    ({"softcap": 0.0}, r"softcap: expected a finite number > 0 or None, got 0.0"),
    ({"logit_scale": float("inf")}, r"logit_scale: expected a finite number, got inf"),
    ({"budget": -1}, r"budget: expected bytes >= 0 or None, got -1"),
    ({"outputs": ("logps", "logits")}, r"outputs: expected a tuple of logps, .*'logits'"),
    ({"outputs": "logps"}, r"outputs: expected a tuple of logps, .*got 'logps'"),
    ({"outputs": ()}, r"outputs: expected a tuple of logps"),
    ({"backend": "mps"}, r"backend: expected one of cuda, triton, .*, torch, got 'mps'"),
]


@pytest.mark.parametrize(("changes", "message"), TABLE, ids=[m[:40] for _, m in TABLE])
def test_value_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        fastpo.linear_logps(**arguments(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_missing_backend_names_itself():
    with pytest.raises(RuntimeError, match="backend 'cuda': "):
        fastpo.linear_logps(**arguments(backend="cuda"))


PLAN_TABLE = [
    ({"tokens": -1}, "tokens: expected an integer >= 0, got -1"),
    ({"vocab": 0}, "vocab: expected an integer >= 1, got 0"),
    ({"hidden": 0}, "hidden: expected an integer >= 1, got 0"),
    ({"dtype": torch.int8}, "dtype: expected float32, bfloat16 or float16, got torch.int8"),
    ({"budget": -5}, "budget: expected bytes >= 0 or None, got -5"),
    ({"device": "gpu"}, "device: expected cpu, cuda or a torch.device, got 'gpu'"),
    ({"backend": "nope"}, "backend: expected one of cuda, triton, .*, got 'nope'"),
]


@pytest.mark.parametrize(("changes", "message"), PLAN_TABLE)
def test_plan_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        fastpo.plan(**{"tokens": 8, "vocab": 16, "hidden": 4} | changes)


def faked(call):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return call.gradients(call.leaves())


def in_a_mode(call):
    leaves = call.leaves()
    with FakeTensorMode(allow_non_fake_inputs=True):
        return call.gradients(leaves)


def on_meta(call):
    leaves = call.leaves().items()
    trained = call.trained
    return call.gradients(
        {k: x.detach().to("meta").requires_grad_(k in trained) for k, x in leaves}
    )


@pytest.mark.parametrize("way", [faked, in_a_mode, on_meta])
@pytest.mark.parametrize("case", CALLS)
def test_tensors_that_hold_nothing(case, way, mesh):
    """Operators have the shapes of their results; the others say no before a kernel runs."""
    call = CALLS[case]
    if call.name in OPERATORS and case != "logps of tiles":
        found = way(call)
        assert [(x.shape, x.dtype) for x in found] == [
            (x.shape, x.dtype) for x in call.gradients(call.leaves())
        ]
        return
    # PyTorch's own words where a value is wanted before that.
    words = r"expected a tensor in memory, got (a FakeTensor|one on the meta device)|_local_scalar"
    refusals = RuntimeError, DataDependentOutputException, NotImplementedError
    with pytest.raises(refusals, match=words + "|Cannot copy out of meta"):
        way(call)

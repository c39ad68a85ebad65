"""Every public operator of torch on lazy logits: values and gradients are those of the logits.

A head whose weight is the identity promises any tensor, so torch's own table of operators and
sample inputs serves.
"""

from __future__ import annotations

import itertools
import logging
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("expecttest")  # torch's table imports it

import torch
from _tiny import one_thread  # noqa: F401
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

from fastpo.integrations.lazy import blocks
from fastpo.integrations.lazy.expressions import ANSWERS
from fastpo.integrations.lazy.functions import FUNCTIONS
from fastpo.integrations.lazy.logits import LazyLogits, promised
from fastpo.integrations.lazy.promise import Promise

# In float32 whatever the logits were rounded to; memory that nobody wrote.
EXACT = {"bfloat16", "half"}
UNWRITTEN = {"empty_like", "new_empty", "new_empty_strided"}
OPERATORS = [op for op in op_db if torch.float32 in op.dtypes and op.name not in EXACT | UNWRITTEN]
# The others care for no block.
KNOWN = {getattr(func, "__name__", "") for func in (*FUNCTIONS, *ANSWERS)}
PARTS = 8


# Thousands of times: `torch.manual_seed` notes each stack for devices that are not there.
seed = torch.default_generator.manual_seed


def samples(op, count):
    """Those whose input a head could have made."""
    seed(0)
    fit = (
        sample
        # Not `op.sample_inputs`, which looks through the stack of pytest for a test's name.
        for sample in op.sample_inputs_func(op, "cpu", torch.float32, requires_grad=False)
        if isinstance(sample.input, torch.Tensor)
        and sample.input.dtype == torch.float32
        and sample.input.layout == torch.strided
        and sample.input.ndim
        and sample.input.numel()
        and sample.input.is_contiguous()
        and sample.input.isfinite().all()
    )
    return itertools.islice(fit, count)


def results(function, sample, lazy):
    """Outputs and d input, or the error."""
    x = sample.input.detach().clone().requires_grad_()
    head = nn.Linear(x.shape[-1], x.shape[-1], bias=False).requires_grad_(False)
    nn.init.eye_(head.weight)
    logits = promised(Promise.of(head, x)) if lazy else x * 1
    seed(0)
    try:
        outputs = function(logits, *sample.args, **sample.kwargs)
        tensors = [out for out in tree_leaves(outputs) if isinstance(out, torch.Tensor)]
        terms = [weighed(out) for out in tensors if out.is_floating_point() and out.requires_grad]
        terms = [term for term in terms if term.requires_grad]
        grad = torch.autograd.grad(sum(terms), x, allow_unused=True)[0] if terms else None
    except Exception as error:  # whichever; the other side must raise as well
        return error
    return [real(out) for out in tensors], grad


def real(out):
    if not isinstance(out, LazyLogits):
        return out
    return torch.empty(out.shape, dtype=out.dtype).copy_(out.detach())


def weighed(out):
    if out.layout != torch.strided:
        return out.to_dense().float().sum()
    weights = torch.linspace(0.5, 1.5, max(out.numel(), 1)).view(out.shape if out.numel() else (1,))
    return (out.float() * weights).sum()


def kept_its_shape(error):
    """Changes in place to another shape are refused."""
    return "to keep shape" in str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", ["all", "a row"])
@pytest.mark.parametrize("part", range(PARTS))
def test_values_and_gradients(part, block, monkeypatch, caplog):
    size = 1 if block == "a row" else 1 << 30
    monkeypatch.setattr(blocks, "BYTES", {"cpu": size, "cuda": size})
    caplog.set_level(logging.ERROR, logger="fastpo")  # until the test ends
    chosen = OPERATORS if block == "all" else [op for op in OPERATORS if op.name in KNOWN]
    count = math.ceil(len(chosen) / PARTS)
    for op in chosen[part * count : (part + 1) * count]:
        variants = {"": op.op, ".method": op.method_variant, ".in_place": op.inplace_variant}
        for sample, (kind, function) in itertools.product(samples(op, 1), variants.items()):
            if function is None:
                continue
            expected, found = (results(function, sample, lazy) for lazy in (False, True))
            if isinstance(found, Exception) and kept_its_shape(found):
                continue
            message = f"{op.formatted_name}{kind}: {found if isinstance(found, Exception) else ''}"
            assert isinstance(found, Exception) == isinstance(expected, Exception), message
            if not isinstance(found, Exception):
                if expected[1] is not None and not expected[1].isfinite().all():
                    found, expected = found[:1], expected[:1]  # a product spreads it over the row
                torch.testing.assert_close(
                    found, expected, rtol=1e-4, atol=1e-4, equal_nan=True,
                    msg=lambda why, name=message: f"{name}{why}",
                )  # fmt: skip

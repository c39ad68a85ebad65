"""Under a compiler every primitive gives what it gives without, most of them as one graph."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from _primitives import CALLS, OPERATORS, Call, N, loss
from _probes import COMPARING
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastpo
from fastpo.testing import make_head

NOT_WHOLE = ("logps of tiles",)  # no tensor of a graph
SEEDS = ("sample_topk",)  # by its call here, which a graph has not


def one_graph(case: str) -> bool:
    return CALLS[case].name in OPERATORS and case not in (*NOT_WHOLE, *SEEDS)


def compiled(call: Call, backend: str = COMPARING, **options: bool) -> list[torch.Tensor]:
    """`call.gradients`, its forward compiled; COMPARING holds shapes to those it was told of."""
    torch.compiler.reset()
    leaves = call.leaves()
    outputs = torch.compile(call.outputs, backend=backend, **options)(leaves)
    found = [x.detach() for x in outputs]
    if not call.trained:
        return found
    return [*found, *torch.autograd.grad(loss(outputs), [leaves[x] for x in call.trained])]


@pytest.mark.parametrize("case", filter(one_graph, CALLS))
def test_one_graph_has_the_same_bits(case):
    call = CALLS[case]
    found = compiled(call, fullgraph=True)
    for ours, plain in zip(found, call.gradients(call.leaves()), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("case", sorted({x for x in CALLS if not one_graph(x)}.difference(SEEDS)))
def test_others_break_the_graph_and_agree(case, mesh):
    call = CALLS[case]
    found = compiled(call, "aot_eager")
    for ours, plain in zip(found, call.gradients(call.leaves()), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("case", filter(one_graph, CALLS))
def test_one_graph_for_any_number_of_tokens(case):
    call, counter = CALLS[case], CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    whole = torch.compile(call.outputs, backend=counter, dynamic=True, fullgraph=True)
    for tokens in (N, N - 1, N - 2):
        before, found = counter.frame_count, []
        for outputs in (call.outputs, whole):
            leaves = call.leaves()
            for name, x in leaves.items():
                if len(x) == N:  # a view of N would be one more size of N
                    leaves[name] = x.detach()[:tokens].clone().requires_grad_(x.requires_grad)
            results = outputs(leaves)
            trained = [leaves[name] for name in call.trained]
            grads = torch.autograd.grad(loss(results), trained) if trained else ()
            found.append([*results, *grads])
        for plain, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain)
    assert counter.frame_count == before


@pytest.mark.parametrize("outputs", [("logps",), ("logps", "entropy", "lse")])
def test_a_head_that_serves_twice_in_a_mixture(outputs):
    """A policy and its reference with one frozen head, and one text under both."""

    def loss(hidden, weight):
        heads = [hidden, hidden], [weight, weight]
        found = fastpo.mixed_linear_logps(*heads, (0.7, 0.4), labels, outputs=outputs)
        return sum((x * torch.arange(len(x))).sum() for x in found if x is not None)

    labels = torch.arange(5) * 3
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=COMPARING)):
        inputs = make_head(5, 31, 8).like(torch.float32)
        value = function(inputs.hidden, inputs.weight)
        results.append((value, *torch.autograd.grad(value, [inputs.hidden, inputs.weight])))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("case", ["linear_logps", "logps of a frozen head", "linear_divergence"])
def test_a_backward_that_is_compiled_by_itself(case):
    call = CALLS[case]
    leaves = call.leaves()
    outputs = call.outputs(leaves)
    torch.compiler.reset()
    whole = torch.compile(backend="aot_eager", fullgraph=True)  # an error of a walk in the graph
    with compiled_autograd._enable(whole):
        loss(outputs).backward()
    found = [*outputs, *(leaves[name].grad for name in call.trained)]
    for ours, plain in zip(found, call.gradients(call.leaves()), strict=True):
        torch.testing.assert_close(ours, plain)


class _Onlooker(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight", "bias")])
def test_an_operator_only_where_somebody_looks(trained, monkeypatch):
    """What PyTorch puts around one takes a sixth of the time of a small head."""
    module = import_module("fastpo.ops.linear_logps")
    operator, calls = module._forward_op, []
    monkeypatch.setattr(module, "_forward_op", lambda *x: (calls.append(x), operator(*x))[1])
    x = make_head(N, 50, 8, bias=True).like(torch.float32)

    def found():
        leaves = {
            name: getattr(x, name).detach().requires_grad_(name in trained)
            for name in ("hidden", "weight", "bias")
        }
        logps = fastpo.linear_logps(**leaves, labels=x.labels).logps
        wanted = [leaves[name] for name in trained]
        return [logps, *(torch.autograd.grad(logps.sum(), wanted) if wanted else ())]

    alone = found()
    assert not calls
    with _Onlooker() as mode:
        watched = found()
    assert len(calls) == mode.seen.count(torch.ops.fastpo.linear_logps.default) == 1
    for a, b in zip(alone, watched, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")  # of reading values of labels
def test_a_trace_holds_the_operator():
    """Not the memory that its numbers were written to when it was traced."""
    x, weight, labels = torch.randn(6, 16), torch.randn(50, 16), torch.arange(6)

    def logps(x):
        return fastpo.linear_logps(x, weight, labels).logps

    traced = torch.jit.trace(logps, x, check_trace=False)
    other = torch.randn(6, 16)
    assert traced(other).equal(logps(other))

"""First derivatives, backwards, are what the primitives have; what else is asked for is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from _primitives import CALLS, LISTED, PRIMITIVES, Call, Leaves, _score, loss
from torch import Tensor
from torch.autograd import forward_ad

import fastpo

TRAINED = {case: call for case, call in CALLS.items() if call.trained}
# The inner primitive is the one that is differentiated twice.
INNER = {"multi_head_logps": "linear_logps", "linear_topk_divergence": "linear_logps"}


def twice(call: Call) -> str:
    # Of a list and its sample it is the list.
    name = {"sample_topk": "linear_topk"}.get(call.name, call.name)
    either = "|".join({name, INNER.get(name, name)})
    return f"^({either}): expected first derivatives only, got .*create_graph=True"


@pytest.mark.parametrize("case", TRAINED)
def test_a_second_derivative_is_refused_by_whichever_way(case, mesh):
    call = TRAINED[case]
    leaves = call.leaves()
    trained = [leaves[name] for name in call.trained]
    plain = torch.autograd.grad(loss(call.outputs(leaves)), trained)
    first = torch.autograd.grad(loss(call.outputs(leaves)), trained, create_graph=True)
    for gradient, expected in zip(first, plain, strict=True):
        assert torch.equal(gradient, expected)
        for leaf in trained:
            # Other terms reach the leaf as well: a constant in place of an error would not show.
            total = gradient.square().sum() + leaf.sum()
            with pytest.raises(RuntimeError, match=twice(call)):
                torch.autograd.grad(total, leaf, retain_graph=True)


class Nothing(torch.autograd.Function):
    """Gives no gradient, which is not one of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("case", TRAINED)
def test_no_gradient_is_one_of_zeros(case, mesh):
    call = TRAINED[case]
    leaves = call.leaves()
    trained = [leaves[name] for name in call.trained]
    found = torch.autograd.grad(
        Nothing.apply(loss(call.outputs(leaves))), trained, allow_unused=True
    )
    assert not any(x is not None and x.any() for x in found)


def test_a_gradient_that_is_added_to_another_is_refused_as_well():
    call = replace(PRIMITIVES["fastpo"], function=partial(_score, accumulate=True, budget=2**40))
    leaves = call.leaves()
    weight = leaves["weight"]
    loss(call.outputs(leaves)).backward()
    first = torch.autograd.grad(loss(call.outputs(leaves)), weight, create_graph=True)[0]
    torch.testing.assert_close(first.detach(), weight.grad)
    with pytest.raises(RuntimeError, match=twice(call)):
        torch.autograd.grad(first.square().sum(), weight)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_derivative_by_the_incoming_gradient_is_refused(name, mesh):
    call = PRIMITIVES[name]
    leaves = call.leaves()
    factor = torch.ones((), requires_grad=True)
    total = loss(call.outputs(leaves)) * factor
    first = torch.autograd.grad(total, leaves["hidden"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=twice(call)):
        torch.autograd.grad(first.sum(), factor)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", PRIMITIVES)
def test_create_graph_for_others_breaks_nothing(name, mesh):
    call = PRIMITIVES[name]
    leaves = call.leaves()
    hidden = leaves["hidden"]
    other = hidden.pow(3).sum()
    total = loss(call.outputs(leaves)) + other
    total.backward(create_graph=True)
    assert hidden.grad is not None and hidden.grad.requires_grad
    found, hidden.grad = hidden.grad.detach(), None  # a circle through the graph
    own = torch.autograd.grad(loss(call.outputs(leaves)), hidden)[0]
    expected = own + 3 * hidden.detach().square()
    torch.testing.assert_close(found, expected)
    by_other = torch.autograd.grad(other, hidden, create_graph=True)[0]
    assert torch.equal(torch.autograd.grad(by_other.sum(), hidden)[0], 6 * hidden.detach())


def over_hidden(call: Call, leaves: Leaves):
    def function(hidden: Tensor) -> Tensor:
        found = call.outputs(leaves | {"hidden": hidden})
        return torch.stack([x.float().sum() for x in found]).sum()

    return function


def dual(function, x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "dual numbers": dual,
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_transforms_are_refused(name, transform, requires_grad, mesh):
    call = PRIMITIVES[name]
    leaves = call.leaves()
    hidden = leaves["hidden"].detach().requires_grad_(requires_grad)
    message = f"^{name}: expected tensors outside torch.func and forward-mode AD, got one inside "
    with pytest.raises(RuntimeError, match=message):
        TRANSFORMS[transform](over_hidden(call, leaves), hidden)


@pytest.mark.parametrize("argument", ["weight", "bias"])
def test_every_tensor_is_asked(argument):
    call = PRIMITIVES["linear_logps"]
    leaves = call.leaves()

    def function(x: Tensor) -> Tensor:
        return loss(call.outputs(leaves | {argument: x}))

    with pytest.raises(RuntimeError, match=r"^linear_logps: expected tensors outside"):
        torch.func.jvp(function, (leaves[argument].detach(),), (leaves[argument].detach(),))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_backward_of_many_gradients_at_once_is_refused(name, mesh):
    call = PRIMITIVES[name]
    leaves = call.leaves()
    found = next(x for x in call.outputs(leaves) if x.requires_grad)
    rows = torch.eye(found.numel(), dtype=found.dtype).view(-1, *found.shape)
    inner = INNER.get(name, name)
    message = f"^({name}|{inner}): expected tensors outside torch.func .*inside torch.func.vmap"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(found, leaves["hidden"], rows, is_grads_batched=True)


@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_a_compiled_transform_is_refused(transform):
    """Where the compiler traces the transform, what it calls is no wrapped tensor of ours."""
    leaves = PRIMITIVES["linear_logps"].leaves()

    def function(hidden: Tensor) -> Tensor:
        return fastpo.linear_logps(hidden, leaves["weight"].detach(), leaves["labels"]).logps.sum()

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: TRANSFORMS[transform](function, x), backend="eager")
    with pytest.raises(Exception, match=re.escape("linear_logps: expected tensors outside")):
        compiled(leaves["hidden"].detach())


def test_a_drawn_list_has_what_its_list_has():
    leaves = PRIMITIVES["linear_topk"].leaves()
    topk = fastpo.linear_topk(leaves["hidden"], leaves["weight"], LISTED)
    drawn = topk.sample(generator=torch.Generator().manual_seed(0))
    first = torch.autograd.grad(drawn.values.sum(), leaves["hidden"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"^linear_topk: expected first derivatives only"):
        torch.autograd.grad(first.sum(), leaves["hidden"])


class _Constant(torch.autograd.Function):
    """Says nothing of a gradient, which is one of zeros."""

    @staticmethod
    def forward(ctx, *values: Tensor) -> Tensor:
        return torch.zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


@pytest.mark.parametrize("case", TRAINED)
def test_a_loss_behind_may_have_no_gradient(case, mesh):
    call = TRAINED[case]
    leaves = call.leaves()
    outputs = [x for x in call.outputs(leaves) if x.requires_grad]
    trained = [leaves[name] for name in call.trained]
    for found in torch.autograd.grad(_Constant.apply(*outputs), trained, allow_unused=True):
        assert found is None or not found.any()


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.name != "fastpo"])
def test_results_are_the_callers_to_write_into(name, mesh):
    """As a loop does that leaves tokens out: `logps[~mask] = 0`."""
    call, found = CALLS[name], []
    for in_place in (False, True):
        leaves = call.leaves()
        outputs = call.outputs(leaves)
        for i, x in enumerate(outputs):
            if in_place:
                x[0] = 0
            elif x.requires_grad:
                first = torch.zeros(len(x), dtype=torch.bool).index_fill(0, torch.tensor(0), True)
                outputs[i] = x.masked_fill(first.view(-1, *(1,) * (x.dim() - 1)), 0)
        if call.trained:
            trained = [leaves[name] for name in call.trained]
            found.append(torch.autograd.grad(loss(outputs), trained))
    for ours, expected in zip(*found, strict=True) if found else ():
        torch.testing.assert_close(ours, expected)


def test_results_over_a_support_are_the_callers_as_well():
    leaves = PRIMITIVES["linear_logps"].leaves()
    support = leaves["words"].unsqueeze(1)
    given = {"support": support, "outputs": ("logps", "entropy", "mean_logits")}
    stats = fastpo.linear_logps(leaves["hidden"], leaves["weight"], leaves["words"], **given)
    with torch.no_grad():
        for x in (stats.logps, stats.entropy, stats.mean_logits):
            x.zero_()
    (stats.logps.sum() + stats.entropy.sum()).backward()

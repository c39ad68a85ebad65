"""Lazy logits in code that is not fastpo's: the gradient is that of the model's own logits."""

from __future__ import annotations

import copy
import pickle

import pytest

pytest.importorskip("transformers")

import numpy as np
import torch
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastpo.integrations.lazy import cell
from fastpo.integrations.lazy.logits import LazyLogits, promised
from fastpo.integrations.lazy.promise import Promise

B, T, H, V = 2, 3, 4, 11
LABELS = torch.randint(0, V, (B * T,), generator=torch.Generator().manual_seed(0))


class OwnCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, labels):
        p = z.softmax(-1)
        ctx.save_for_backward(p, labels)
        return -z.log_softmax(-1).gather(-1, labels[:, None]).mean()

    @staticmethod
    def backward(ctx, grad):
        p, labels = ctx.saved_tensors
        return grad * (p - F.one_hot(labels, V)) / len(labels), None


class Square(torch.autograd.Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Halve(torch.autograd.Function):
    """Changes its input."""

    @staticmethod
    def forward(ctx, z):
        ctx.mark_dirty(z)
        return z.mul_(0.5)

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def nll(z):
    return F.cross_entropy(z.view(-1, V), LABELS)


def also(z):
    """Another term beside, which fastpo answers."""
    return 0.1 * z.logsumexp(-1).square().mean()


def hooked(z):
    z.register_hook(lambda grad: 2 * grad)
    return nll(z)


def grad_kept(z):
    z.retain_grad()
    loss = nll(z)
    loss.backward(retain_graph=True)
    return (z * z.grad).sum()


def asked_for(z):
    z.retain_grad()  # before something is read of logits that are more than a block
    (grad,) = torch.autograd.grad(z.square().sum(), z, retain_graph=True)
    return (grad * z).sum()


def leaf(z):
    x = z.detach().requires_grad_()
    nll(x).backward()
    return (x.grad * z).sum()


def divided(z):
    z.div_(2.0)
    return nll(z) + Square.apply(z).mean()


def view_divided(z):
    flat = z.view(-1, V)
    flat.div_(2.0)
    return F.cross_entropy(flat, LABELS)


def assigned(z):
    z[..., 5] = -3.0
    z[:, 0] = 1.0
    return nll(z) + OwnCrossEntropy.apply(z.view(-1, V), LABELS)


def changed_through_values(z):
    z.transpose(0, 1).div_(2.0)
    return nll(z)


def changed_by_a_function(z):
    F.relu(z, inplace=True)
    return nll(z) + Square.apply(z * 1).mean()


def through_data(z):
    z.data.mul_(2.0)
    return nll(z)


def into_another(z):
    into = torch.empty(B, T, V)
    torch.mul(z.detach(), 2, out=into)
    return (into * z).sum()


def compiled(backend):
    def read(z):
        torch.compiler.reset()
        return torch.compile(lambda x: nll(x) + x.mean(), fullgraph=True, backend=backend)(z)

    return read


def constants(z):
    with torch.no_grad():
        part = z[:, :1]
    return nll(z) + part.logsumexp(-1).sum()


def autocast(z):
    with torch.autocast("cpu", torch.bfloat16):
        return nll(z.float())


def tangent(z):
    with forward_ad.dual_level():
        by = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
        return forward_ad.unpack_dual((z / by).square().mean()).tangent


READERS = {
    "function": lambda z: OwnCrossEntropy.apply(z.view(-1, V), LABELS) + also(z),
    "function_that_saves": lambda z: Square.apply(z).mean() + also(z),
    "function_that_changes": lambda z: nll(Halve.apply(z)),
    "reentrant": lambda z: checkpoint(nll, z, use_reentrant=True) + also(z),
    "checkpoint": lambda z: checkpoint(lambda x: nll(x) + also(x), z, use_reentrant=False),
    "checkpoint_of_values": lambda z: checkpoint(lambda x: x.exp().mean(), z, use_reentrant=False),
    "hook": hooked,
    "retain_grad": grad_kept,
    "autograd.grad": asked_for,
    "leaf": leaf,
    "in_place": divided,
    "view_in_place": view_divided,
    "setitem": assigned,
    "values_in_place": changed_through_values,
    "function_in_place": changed_by_a_function,
    "data": through_data,
    "out": into_another,
    "vmap": lambda z: torch.vmap(lambda row: row.logsumexp(-1).mean())(z).sum(),
    "vmap_of_two": lambda z: torch.vmap(F.cross_entropy)(z, LABELS.view(B, T)).sum(),
    "func.grad": lambda z: torch.func.grad(lambda x: (x * x).sum())(z).sum(),
    "in_func.grad": lambda z: torch.func.grad(lambda t: nll(z / t))(torch.full((1,), 2.0)).sum(),
    "in_hessian": lambda z: torch.func.hessian(lambda t: nll(z * t))(torch.tensor(2.0)).sum(),
    "in_vmap": lambda z: torch.vmap(lambda t: nll(z * t))(torch.ones(2)).sum(),
    "in_jvp": lambda z: torch.func.jvp(lambda t: nll(z * t), (torch.ones(1),), (torch.ones(1),))[1],
    "jvp": lambda z: torch.func.jvp(lambda x: nll(x), (z,), (torch.ones(z.shape),))[1],
    "forward_ad": tangent,
    "compile": compiled("aot_eager"),
    "numpy_scalar": lambda z: (np.float64(2) * z).logsumexp(-1).mean(),
    "numpy": lambda z: (torch.from_numpy(np.asarray(z.detach())) * z).sum(),
    "deepcopy": lambda z: (copy.deepcopy(z.detach()) * z).sum(),
    "pickle": lambda z: (pickle.loads(pickle.dumps(z.detach())) * z).sum(),
    "dlpack": lambda z: (torch.from_dlpack(z.detach()) * z).sum(),
    "two": lambda z: torch.cat([z, z], 0).logsumexp(-1).sum() + torch.where(z > 0, z, 0 * z).sum(),
    "of_a_list": lambda z: torch.stack([row[0] for row in z]).logsumexp(-1).sum(),
    "no_grad": constants,
    "autocast": autocast,
    "nothing": lambda z: nll(z.clone()) + 0 * torch.zeros_like(z).sum() + z.new_zeros(()),
}


def gradients(read, lazy):
    torch.manual_seed(1)
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)
    loss = read(promised(Promise.of(head, hidden)) if lazy else head(hidden))
    loss.backward()
    return loss.detach(), hidden.grad, head.weight.grad, head.bias.grad


@pytest.mark.parametrize("name", READERS)
def test_the_gradient_is_that_of_the_logits(name):
    torch.testing.assert_close(
        gradients(READERS[name], True), gradients(READERS[name], False), rtol=1e-5, atol=1e-6
    )


def lazy():
    torch.manual_seed(1)
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)
    return promised(Promise.of(head, hidden)), head, hidden


def test_it_is_a_tensor():
    logits = lazy()[0]
    assert isinstance(logits, torch.Tensor) and logits.requires_grad and not logits.is_leaf
    assert repr(logits) == "LazyLogits(shape=(2, 3, 11), dtype=torch.float32, device='cpu')"


@pytest.mark.parametrize(
    "late",
    [
        lambda z: z.register_hook(print),
        lambda z: z.retain_grad(),
        lambda z: torch.autograd.grad(z.sum(), z),
        lambda z: nll(z).backward(inputs=[z]),
    ],
)
def test_a_hook_after_the_reading_is_an_error(late):
    logits = lazy()[0]
    nll(logits)
    with pytest.raises(RuntimeError, match="expected before anything is read of these logits"):
        late(logits)


def test_a_backward_may_start_from_logits_that_were_read():
    """Only whose gradient is asked for must not be passed by: a saliency of the predicted words."""
    logits, head, hidden = lazy()
    words = F.one_hot(logits.argmax(-1), V).float()
    found = torch.autograd.grad(logits, (hidden, head.weight), words)
    expected = torch.autograd.grad(head(hidden), (hidden, head.weight), words)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("read", [nll, lambda z: z.exp(), lambda z: Square.apply(z)])
def test_a_view_does_not_hide_a_change_in_place(read):
    """With the model's own logits both would change."""
    logits = lazy()[0]
    part = logits[:, 1:]
    part.div_(2.0)
    with pytest.raises(RuntimeError, match="no change in place through another view"):
        read(logits)
    copy_of = lazy()[0]
    (copy_of * 2).div_(2.0)  # a copy may change
    nll(copy_of)


def test_a_change_through_values_stops_what_would_miss_it():
    logits = lazy()[0]
    logits.transpose(0, 1).mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place as a whole"):
        Square.apply(logits)


def test_another_shape_in_place_is_an_error():
    with pytest.raises(RuntimeError, match=r"squeeze_: expected lazy logits to keep shape"):
        lazy()[0][:1].squeeze_()


@pytest.mark.parametrize("change", ["weight", "hidden states"])
def test_logits_are_read_before_the_weights_change(change):
    logits, head, hidden = lazy()
    with torch.no_grad():
        (head.weight if change == "weight" else hidden).mul_(2.0)
    with pytest.raises(RuntimeError, match=f"expected to be read before .*{change} changes"):
        nll(logits)


def test_second_derivatives_are_refused():
    logits, _, hidden = lazy()
    (grad,) = torch.autograd.grad(logits.exp().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_one_copy_is_kept(monkeypatch):
    made, compute = [], Promise.materialize
    monkeypatch.setattr(Promise, "materialize", lambda self: made.append(1) or compute(self))
    logits = lazy()[0]
    (logits.exp().sum() + logits.softmax(-1).sum() + Square.apply(logits).sum()).backward()
    assert made == [1]


def test_inductor(monkeypatch):
    monkeypatch.setattr(cell, "told", set())
    read = compiled("inductor")
    torch.testing.assert_close(gradients(read, True), gradients(read, False), rtol=1e-5, atol=1e-6)
    assert {name for name, _ in cell.told} == {"torch.compile"}


def test_a_checkpoint_recomputes_through_the_head(monkeypatch):
    monkeypatch.setattr(cell, "told", set())
    gradients(READERS["checkpoint"], True)
    assert not cell.told


def test_no_word_without_values(monkeypatch):
    monkeypatch.setattr(cell, "told", set())
    logits = lazy()[0]
    assert torch.zeros_like(logits).shape == logits.shape and logits.new_empty(2).shape == (2,)
    assert isinstance(logits.detach(), LazyLogits) and not cell.told

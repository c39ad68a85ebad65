"""One attached model, several threads: a call's state is that call's."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
from _tiny import one_thread  # noqa: F401
from torch.utils.checkpoint import checkpoint

import fastpo

SECONDS = 60


class Halted:
    """A labelled call in a thread of its own that stands still behind the backbone."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __enter__(self):
        self.pool = ThreadPoolExecutor(1)
        thread = self.pool.submit(threading.get_ident).result()

        def halt(module, args, output):
            if threading.get_ident() == thread:
                self.inside.set()
                assert self.go_on.wait(SECONDS)

        self.hook = self.model.model.register_forward_hook(halt)
        self.call = self.pool.submit(lambda: self.model(**self.inputs))
        assert self.inside.wait(SECONDS)
        return self

    def __exit__(self, *error):
        self.go_on.set()
        self.call.exception(SECONDS)
        self.pool.shutdown()
        self.hook.remove()


def unlabelled(inputs):
    return {name: x for name, x in inputs.items() if name != "labels"}


def assert_nothing_left(model):
    assert "forward" not in vars(model.lm_head)
    assert "_loss_function" not in vars(model)


@pytest.fixture
def model():
    return tiny.model("gemma2")


@pytest.fixture
def expected(model):
    """Loss and logits of the model alone."""
    with torch.no_grad():
        output = model(**tiny.batch())
    return output.loss, output.logits


def test_others_meet_the_model_while_one_is_scored(model, expected):
    loss, logits = expected
    other = {**tiny.batch(), "labels": tiny.batch(seed=1)["labels"]}
    others = model(**other).loss
    own_loss = model.loss_function
    fastpo.attach(model)
    with Halted(model, tiny.batch()) as halted:
        assert torch.equal(model(**unlabelled(tiny.batch())).logits, logits)
        assert torch.equal(model.get_output_embeddings()(torch.eye(32)), model.lm_head.weight.t())
        torch.testing.assert_close(model(**other).loss, others)
        labels = tiny.batch()["labels"]
        found = model.loss_function(logits, labels, model.config.vocab_size)
        torch.testing.assert_close(found, own_loss(logits, labels, model.config.vocab_size))
    torch.testing.assert_close(halted.call.result().loss.detach(), loss)
    assert_nothing_left(model)


def test_a_copy_made_meanwhile(model, expected):
    handle = fastpo.attach(model)
    with Halted(model, tiny.batch()):
        twin = copy.deepcopy(model)
    handle.detach()
    twin.model._forward_hooks.clear()
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()  # tied
    assert not twin(**unlabelled(tiny.batch())).logits.any()
    uniform = torch.tensor(float(twin.config.vocab_size)).log()
    torch.testing.assert_close(twin(**tiny.batch()).loss.detach(), uniform)
    assert_nothing_left(twin)


def test_detached_meanwhile(model, expected):
    loss, logits = expected
    handle = fastpo.attach(model)
    with Halted(model, tiny.batch()) as halted:
        handle.detach()
        output = model(**tiny.batch())
        assert torch.equal(output.logits, logits)
        torch.testing.assert_close(output.loss.detach(), loss)
    assert halted.call.result().logits is None
    torch.testing.assert_close(halted.call.result().loss.detach(), loss)
    assert_nothing_left(model)


def test_a_call_that_fails_leaves_nothing(model, expected):
    fastpo.attach(model)

    def fail(module, args, output):
        raise KeyError("a layer's own")

    hook = model.model.register_forward_hook(fail)
    with pytest.raises(KeyError, match="a layer's own"):
        model(**tiny.batch())
    assert_nothing_left(model)
    hook.remove()
    torch.testing.assert_close(model(**tiny.batch()).loss.detach(), expected[0])


def test_many_calls_at_once(model, expected):
    loss, logits = expected
    fastpo.attach(model)
    start = threading.Barrier(3)

    def rounds(call):
        start.wait(SECONDS)
        with torch.no_grad():
            return [call() for _ in range(25)]

    with ThreadPoolExecutor(3) as pool:
        scoring = [pool.submit(rounds, lambda: model(**tiny.batch()).loss) for _ in range(2)]
        plain = pool.submit(rounds, lambda: model(**unlabelled(tiny.batch())).logits)
        losses = [x for one in scoring for x in one.result()]
        assert all(torch.equal(x, logits) for x in plain.result())
    torch.testing.assert_close(torch.stack(losses), loss.expand(50))
    assert_nothing_left(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_whole_model_computed_again_in_the_backward(model, use_reentrant):
    """In whichever thread autograd does so."""
    fastpo.attach(model)
    inputs = tiny.batch()
    hidden = model.get_input_embeddings()(inputs.pop("input_ids")).detach()

    def loss(hidden):
        return model(inputs_embeds=hidden, **inputs).loss

    grads = []
    for call in (loss, lambda hidden: checkpoint(loss, hidden, use_reentrant=use_reentrant)):
        given = hidden.clone().requires_grad_()
        call(given).backward()
        grads.append(given.grad)
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads)


def replicas(model):
    """What nn.DataParallel makes of a model, here of changed weights."""
    found = []
    for scale in (1.0, 0.5):
        copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, made in copies.items():
            made._modules = {name: copies[child] for name, child in module._modules.items()}
            for name, parameter in module._parameters.items():
                if parameter is None:
                    made._parameters[name] = None
                else:
                    setattr(made, name, parameter * scale)
        found.append(copies[model])
    return found


def test_replicas_score_with_their_own_weights():
    model = tiny.model("llama")
    own = [replica(**tiny.batch()).loss for replica in replicas(model)]
    assert abs(own[0] - own[1]) > 0.1
    handle = fastpo.attach(model)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda replica: replica(**tiny.batch()).loss, replicas(model))
        torch.testing.assert_close(list(found), own)
    handle.detach()
    assert not {"forward", "_replicate_for_data_parallel"} & vars(model).keys()


def test_a_compiled_model():
    model = tiny.model("llama", num_hidden_layers=1)
    loss, logits = (model(**tiny.batch())[name].detach() for name in ("loss", "logits"))
    handle = fastpo.attach(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(**tiny.batch()).loss.detach(), loss)
        torch.testing.assert_close(compiled(**unlabelled(tiny.batch())).logits.detach(), logits)
    handle.detach()
    torch.testing.assert_close(compiled(**tiny.batch()).logits.detach(), logits)

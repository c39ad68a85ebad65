"""Models that were compiled before fastpo gets them: as a whole, or accelerate's regions."""

from __future__ import annotations

import _tiny as tiny
import pytest
import torch
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.lazy.logits import LazyLogits

pytestmark = pytest.mark.usefixtures("afresh")


def regions(model):
    return pytest.importorskip("accelerate.utils").compile_regions(model, backend="eager")


def whole(model):
    return torch.compile(model, backend="eager")


def make(name="llama", compiled=None):
    torch.compiler.reset()
    model = tiny.model(name, num_hidden_layers=1).train()
    return model if compiled is None else compiled(model)


def trained(model, loss):
    """Loss and gradients, by the names they have in a model that nobody compiled."""
    model.zero_grad()
    loss.backward()
    grads = {n.replace("_orig_mod.", ""): p.grad.clone() for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **grads}


def assert_trains(model, loss_of, name="llama"):
    expected = make(name)
    expected = trained(expected, expected(**tiny.batch()).loss)
    for _ in range(2):
        torch.testing.assert_close(trained(model, loss_of(model)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [regions, whole])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attach(compiled, name):
    model = make(name, compiled)
    if name == "gemma2":
        model(**tiny.batch())  # and compiled by now
    with fastpo.attach(model):
        output = model(**tiny.batch())
        assert output.logits is None and output.logps is not None
        assert_trains(model, lambda model: model(**tiny.batch()).loss, name)
    assert model(**tiny.batch()).logits is not None


def test_lora_on_the_head_is_read():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make(), config)
    expected = model(**tiny.batch()).loss.detach()
    model = regions(model)
    with fastpo.attach(model):
        torch.testing.assert_close(model(**tiny.batch()).loss.detach(), expected)


def test_lazy_logits_of_regions():
    model, inputs = make(compiled=regions), tiny.batch()
    labels = inputs.pop("labels")

    def loss(model):
        logits = model(**inputs).logits
        assert isinstance(logits, LazyLogits)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    with fastpo.lazy_logits(model):
        assert_trains(model, loss)
    assert not isinstance(model(**inputs).logits, LazyLogits)


def test_lazy_logits_of_a_compiled_model(caplog):
    model = make(compiled=whole)
    with fastpo.lazy_logits(model):
        assert_trains(model, lambda model: model(**tiny.batch()).loss)
    assert caplog.text.count("LlamaForCausalLM keeps its full logits: it is compiled") == 1


@pytest.mark.parametrize("compiled", [regions, whole])
def test_one_head_is_enough(compiled):
    model = make(compiled=compiled)
    with fastpo.attach(model), pytest.raises(ValueError, match="expected one without a fastpo"):
        fastpo.lazy_logits(model)


@pytest.mark.parametrize(
    ("compiled", "why"), [(regions, "layers that are compiled"), (whole, "it is compiled")]
)
def test_shared_prompts(compiled, why, caplog):
    model = make(compiled=compiled)
    with fastpo.shared_prompts(model, always=True):
        assert_trains(model, lambda model: model(**tiny.batch()).loss)
    assert caplog.text.count(f"LlamaModel keeps its padded batch: {why}") == 1

"""`fastpo.lazy_logits`, `fastpo.patch(lazy=True)`: a model is what it was, without its logits."""

from __future__ import annotations

import copy
import io
import threading

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import torch.nn.functional as F
import transformers
from _tiny import one_thread  # noqa: F401
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastpo
from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.logits import LazyLogits

ARCHITECTURES = ["llama", "gemma2", "cohere", "granite", "phi", "qwen2_moe", "falcon_h1"]


pytestmark = pytest.mark.usefixtures("afresh")


@pytest.fixture(params=["one", "all"])
def lazily(request):
    """Makes a model's logits lazy, by one way or the other, until the second call."""
    handles = []

    def switch(model):
        if handles:
            handles.pop()()
        elif request.param == "one":
            handles.append(fastpo.lazy_logits(model).detach)
        else:
            fastpo.patch(lazy=True)
            handles.append(fastpo.unpatch)
        return model

    return switch


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=320, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def logps(model, batch):
    """What a loop of one's own does."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return (each * (labels != -100)).sum(-1), entropy.mean()


def loss(model, batch):
    found, entropy = logps(model, batch)
    return model(**batch).loss - found.mean() - 0.1 * entropy


def trained(model, batch):
    """Loss and gradients."""
    model.zero_grad()
    found = loss(model, batch)
    found.backward()
    return found.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def seq2seq_batch():
    return {**tiny.batch(rows=2), "decoder_input_ids": tiny.batch(rows=2, seed=3)["input_ids"]}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "t5", "vision"])
def test_loss_and_gradients_are_the_models(name, lazily):
    if name == "qwen2_moe" and transformers.__version__ < "4.57":
        pytest.skip("its own loss over the router asks a CPU for its index there")
    if name == "t5":
        model, batch = t5(), seq2seq_batch()
    else:
        model = tiny.vision_language_model() if name == "vision" else tiny.model(name)
        batch = tiny.batch()
    expected = trained(model, batch)
    lazily(model)
    assert isinstance(model(**batch).logits, LazyLogits)
    found = trained(model, batch)
    assert not cell.told
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    lazily(model)
    assert not isinstance(model(**batch).logits, LazyLogits)
    assert "forward" not in vars(model)
    torch.testing.assert_close(trained(model, batch), expected)


def test_a_bias_beside_the_head(lazily, monkeypatch):
    """`final_logits_bias` [1, V] of BART, which its forward adds to the logits."""
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1})
    config = transformers.BartConfig(
        vocab_size=320, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model, batch = transformers.BartForConditionalGeneration(config).eval(), seq2seq_batch()
    model.final_logits_bias.normal_()
    expected = trained(model, batch)
    lazily(model)
    found = trained(model, batch)
    assert not cell.told and isinstance(model(**batch).logits, LazyLogits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_lora_from_outside_and_inside(lazily):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    for wrap_first in (True, False):
        torch.manual_seed(0)
        base = tiny.model("llama")
        model = peft.get_peft_model(base, config) if wrap_first else base
        lazily(model)
        model = model if wrap_first else peft.get_peft_model(base, config)
        assert isinstance(model(**tiny.batch()).logits, LazyLogits)
        found = trained(model, tiny.batch())
        lazily(model)
        torch.testing.assert_close(found, trained(model, tiny.batch()), rtol=1e-4, atol=1e-4)


def test_generate_samples_from_the_models_own_logits(lazily, caplog):
    model, ids = tiny.model("llama"), tiny.batch()["input_ids"]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
    lazily(model)
    found = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(found.sequences, expected.sequences)
    assert not any(isinstance(x, LazyLogits) for x in found.logits)
    assert "full logits" not in caplog.text


def test_copies_pickles_and_states(lazily):
    model = tiny.model("llama")
    state = model.state_dict()
    lazily(model)
    assert model.state_dict().keys() == state.keys()
    twin = copy.deepcopy(model)
    assert isinstance(twin(**tiny.batch()).logits, LazyLogits)
    assert twin(**tiny.batch()).loss == model(**tiny.batch()).loss
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded(**tiny.batch()).logits, LazyLogits)
    torch.testing.assert_close(loaded(**tiny.batch()).loss, model(**tiny.batch()).loss)


def tangents(score, weights):
    make, read = torch.autograd.forward_ad.make_dual, torch.autograd.forward_ad.unpack_dual
    with torch.autograd.forward_ad.dual_level():
        return read(score({k: make(v, v) for k, v in weights.items()}, ROWS)).tangent


ROWS = torch.arange(1, 13).view(3, 4)
TRANSFORMS = {
    "vmap": lambda f, w: torch.func.vmap(lambda row: f(w, row[None]))(ROWS),
    "grad": lambda f, w: torch.func.grad(f)(w, ROWS),
    "grad of each row": lambda f, w: torch.func.vmap(
        torch.func.grad(lambda w, row: f(w, row[None])), (None, 0)
    )(w, ROWS),
    "jvp": lambda f, w: torch.func.jvp(lambda w: f(w, ROWS), (w,), (w,)),
    "jvp of grad": lambda f, w: torch.func.jvp(torch.func.grad(lambda w: f(w, ROWS)), (w,), (w,)),
    "forward-mode AD": tangents,
}


@pytest.mark.parametrize("names", [("lm_head.weight",), ("model.norm.weight",), None])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_model_inside_torch_func(lazily, transform, names):
    """With the head's weight, one before it and all as its arguments."""
    model = tiny.model("llama", attn_implementation="eager")
    weights = {k: v.detach() for k, v in model.named_parameters() if names is None or k in names}

    def score(weights, ids):
        logits = torch.func.functional_call(model, weights, (ids,)).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()

    expected = TRANSFORMS[transform](score, weights)
    lazily(model)
    torch.testing.assert_close(TRANSFORMS[transform](score, weights), expected)


def test_another_thread_sees_lazy_logits_too(lazily):
    model, found = tiny.model("llama"), []
    lazily(model)
    thread = threading.Thread(target=lambda: found.append(loss(model, tiny.batch()).item()))
    thread.start()
    thread.join()
    assert found == pytest.approx([loss(model, tiny.batch()).item()], rel=1e-6)


def test_a_compiled_model_has_real_logits(lazily, caplog):
    model, batch = tiny.model("llama"), tiny.batch()
    expected = model(**batch).logits
    lazily(model)
    torch.compiler.reset()
    # No compiler takes the cache of transformers 4.55.
    found = torch.compile(model, backend="eager", fullgraph=True)(**batch, use_cache=False).logits
    torch.testing.assert_close(torch.empty_like(expected).copy_(found), expected)
    assert caplog.text.count("LlamaForCausalLM keeps its full logits: it is compiled") == 1


def test_activation_checkpointing(lazily):
    model, batch = tiny.model("llama").train(), tiny.batch()
    expected = trained(model, batch)
    lazily(model)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(trained(model, batch), expected, rtol=1e-4, atol=1e-4)


class Normalised(transformers.LlamaForCausalLM):
    """A forward of a script's own, which computes the wide part again in the backward."""

    def forward(self, input_ids, attention_mask=None, labels=None, **more):
        def of_hidden(hidden):
            logits = self.lm_head(hidden).float()
            return logits - logits.logsumexp(-1, keepdim=True)

        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = checkpoint(of_hidden, hidden, use_reentrant=False)
        loss = None
        if labels is not None:
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss, logits)


def test_a_checkpoint_inside_a_forward(lazily):
    model, batch = tiny.model("llama").train(), tiny.batch()
    model.__class__ = Normalised
    expected = trained(model, batch)
    lazily(model)
    torch.testing.assert_close(trained(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_scoring_without_gradient(lazily):
    model, batch = tiny.model("llama"), tiny.batch()
    with torch.no_grad():
        expected = logps(model, batch)
        lazily(model)
        torch.testing.assert_close(logps(model, batch), expected, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(logps(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["smoothed", "loss_function", "metrics"])
def test_transformers_trainer(kind, lazily, tmp_path):
    data = [{k: v[i] for k, v in tiny.batch(rows=6).items()} for i in range(6)]

    def summed(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / 10

    def run(lazy):
        model = tiny.model("llama")
        if lazy:
            lazily(model)
        args = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=3, report_to="none", use_cpu=True,
            label_smoothing_factor=0.1 if kind == "smoothed" else 0.0, save_strategy="no",
            disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, args, train_dataset=data, eval_dataset=data,
            compute_loss_func=summed if kind == "loss_function" else None,
            compute_metrics=(lambda p: {"top": float(p.predictions.max())})
            if kind == "metrics" else None,
        )  # fmt: skip
        trainer.train()
        scored = trainer.evaluate() if kind != "loss_function" else {}
        if lazy:
            lazily(model)
        numbers = [scored.get(f"eval_{name}", 0.0) for name in ("loss", "top")]
        return torch.tensor(numbers), [p.detach() for p in model.parameters()]

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


def test_reward_models_are_left_alone():
    own = transformers.LlamaForSequenceClassification.forward
    fastpo.patch(lazy=True)
    assert transformers.LlamaForSequenceClassification.forward is own
    head = tiny.model("llama").config
    head.num_labels = 1
    scorer = transformers.LlamaForSequenceClassification(head)
    with pytest.raises(ValueError, match="expected one with output embeddings, got LlamaForSeq"):
        fastpo.lazy_logits(scorer)


def test_a_value_head_on_top(lazily):
    class WithValue(torch.nn.Module):
        """As TRL's AutoModelForCausalLMWithValueHead."""

        def __init__(self, model):
            super().__init__()
            self.model, self.value = model, torch.nn.Linear(32, 1)

        def forward(self, **batch):
            out = self.model(**batch, output_hidden_states=True)
            return out.logits.float(), out.loss, self.value(out.hidden_states[-1]).squeeze(-1)

    torch.manual_seed(0)
    model, batch = WithValue(tiny.model("llama")), tiny.batch()

    def read():
        logits, loss, values = model(**batch)
        return loss + values.mean() + logits.logsumexp(-1).mean()

    expected = read()
    lazily(model.model)
    torch.testing.assert_close(read(), expected)
    assert not cell.told


def test_attach_and_trainers_on_top():
    fastpo.patch(lazy=True)
    model, batch = tiny.model("llama"), tiny.batch()
    expected = model(**batch).loss
    with fastpo.attach(model):
        found = model(**batch)
        assert found.logits is None
        torch.testing.assert_close(found.loss, expected)
        with pytest.raises(ValueError, match="expected one without a fastpo head"):
            fastpo.lazy_logits(model)


def test_a_quantised_head_keeps_its_logits(caplog, lazily):
    class Other(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model, batch = tiny.model("llama"), tiny.batch()
    other = Other(32, model.lm_head.out_features, bias=False)
    model.set_output_embeddings(other)
    lazily(model)
    assert not isinstance(model(**batch).logits, LazyLogits)
    assert "LlamaForCausalLM keeps its full logits" in caplog.text
    assert "got test_lazy_models.Other" in caplog.text


def test_nothing_is_computed_twice_when_all_logits_are_asked_for():
    model, batch = tiny.model("llama"), tiny.batch()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: None)
    with torch.no_grad(), fastpo.lazy_logits(model):
        logits = model(**batch).logits
        first = logits.cumsum(-1)
        assert logits._cell.values is not None
        calls.append(logits._cell.values)
        assert torch.equal(logits.cumsum(-1), first) and logits._cell.values is calls[0]


def test_lazy_everywhere_comes_and_goes(caplog):
    kind = transformers.LlamaForCausalLM
    own = kind.forward
    with fastpo.patched(lazy=True):
        assert kind.forward is not own
        with fastpo.patched():  # for a TRL without seams they are lazy all the same
            assert (kind.forward is own) == ("lazy logits serve" not in caplog.text)
        assert kind.forward is not own
        fastpo.patch(lazy=True, budget=0)
    assert kind.forward is own

    class Later(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    fastpo.patch(lazy=True)
    model = Later(tiny.model("llama").config)
    assert isinstance(model(**tiny.batch()).logits, LazyLogits)
    fastpo.unpatch()
    assert not isinstance(model(**tiny.batch()).logits, LazyLogits)


def test_bad_input():
    with pytest.raises(ValueError, match="model: expected one with output embeddings, got Linear"):
        fastpo.lazy_logits(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend: expected"):
        fastpo.lazy_logits(tiny.model("llama"), backend="no such")
    with pytest.raises(ValueError, match="budget: expected"):
        fastpo.patch(lazy=True, budget=-1)

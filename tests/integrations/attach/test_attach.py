"""`fastpo.attach`: the model's own loss and gradients, and nothing else changed."""

from __future__ import annotations

import copy
import pickle

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import transformers
from _tiny import one_thread  # noqa: F401
from torch import nn

import fastpo
from fastpo.testing import assert_as_good_as_eager


def step(model, inputs):
    """Loss and every gradient."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, {"loss": output.loss.detach(), **grads}


def assert_same(ours, own):
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_loss_and_gradients_are_the_models_own(name):
    if name == "qwen2_moe" and transformers.__version__ < "4.57":
        pytest.skip("its own loss over the router asks a CPU for its index there")
    model, inputs = tiny.model(name), tiny.batch()
    own_output, own = step(model, inputs)
    fastpo.attach(model)
    output, ours = step(model, inputs)
    assert_same(ours, own)
    assert isinstance(output, type(own_output))
    assert output.logits is None
    assert output.logps.shape == (3, 11)
    if name in ("mixtral", "qwen2_moe"):
        assert_same(output.aux_loss, own_output.aux_loss)
        assert own_output.aux_loss > 0


CALLS = {
    "num_items_in_batch": {"num_items_in_batch": 7},
    "num_items_in_batch_tensor": {"num_items_in_batch": torch.tensor(7)},
    "no_items": {"num_items_in_batch": 0},
    "no_items_tensor": {"num_items_in_batch": torch.tensor(0)},
    "none_of_none": {"labels": torch.full((3, 12), -100), "num_items_in_batch": torch.tensor(0)},
    "shift_labels": {
        "shift_labels": torch.arange(36).view(3, 12).masked_fill(torch.eye(3, 12) > 0, -100)
    },
    "all_ignored": {"labels": torch.full((3, 12), -100), "num_items_in_batch": 7},
    "all_ignored_mean": {"labels": torch.full((3, 12), -100)},
}


@pytest.mark.parametrize("call", CALLS)
def test_reductions(call):
    model, inputs = tiny.model("llama"), {**tiny.batch(), **CALLS[call]}
    _, own = step(model, inputs)
    fastpo.attach(model)
    output, ours = step(model, inputs)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=2e-6, equal_nan=True)
    assert output.logps.shape[1] == (12 if call == "shift_labels" else 11)


def test_shift_labels_alone_are_labels():
    model, labels = tiny.model("llama"), CALLS["shift_labels"]["shift_labels"]
    inputs = {"input_ids": tiny.batch()["input_ids"], "shift_labels": labels}
    with fastpo.attach(model):
        alone = model(**inputs).loss
        assert_same(alone, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "phi"])
def test_statistics(name):
    model, inputs = tiny.model(name), tiny.batch()
    logits = model(**inputs).logits[:, :-1].double() / 0.7
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "lse")
    fastpo.attach(model, temperature=0.7, outputs=outputs)
    found = model(**inputs)
    labels = inputs["labels"][:, 1:]
    log_p, scored = logits.log_softmax(-1), labels != -100
    expected = {
        "logps": log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "lse": logits.logsumexp(-1),
    }
    for key, value in expected.items():
        assert_same(found[key].double(), value * scored)
    assert_same(found.is_top1, (logits.argmax(-1) == labels) & scored)
    assert_same(found.loss, -found.logps.sum() / scored.sum())


def test_without_labels_the_model_is_what_it_was():
    model, inputs = tiny.model("gemma2"), tiny.batch()
    del inputs["labels"]
    keys, forward = list(model.state_dict()), model.forward
    logits = model(**inputs).logits
    sampling = {"max_new_tokens": 4, "do_sample": False}
    generated = model.generate(inputs["input_ids"], **sampling)
    handle = fastpo.attach(model)
    ours = model.forward
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(inputs["input_ids"], **sampling), generated)
    assert list(model.state_dict()) == keys
    handle.detach()
    assert model.forward == forward
    assert torch.equal(ours(**inputs).logits, logits)
    assert "_fastpo" not in vars(model)
    assert model(**tiny.batch()).logits is not None


def test_detach_under_a_wrapper_put_on_later():
    """accelerate wraps `model.forward` for mixed precision and leaves it so."""
    model = tiny.model("llama")
    handle = fastpo.attach(model)
    ours = model.forward
    model.forward = lambda **inputs: ours(**inputs)
    handle.detach()
    assert model(**tiny.batch()).logits is not None
    again = fastpo.attach(model)
    handle.detach()
    assert model(**tiny.batch()).logits is None
    model.forward = ours
    again.detach()
    assert "forward" not in vars(model)


# On the head: nothing, a whole copy, LoRA, DoRA.
@pytest.mark.parametrize("head", [None, "whole", "lora", "dora"])
@pytest.mark.parametrize("order", ["attach_first", "peft_first"])
def test_peft(order, head):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", *(["lm_head"] if head in ("lora", "dora") else [])],
        init_lora_weights=False,
        modules_to_save=["lm_head"] if head == "whole" else None,
        use_dora=head == "dora",
    )
    model, inputs = tiny.model("llama"), tiny.batch()
    if order == "attach_first":
        fastpo.attach(model)
    wrapped = peft.get_peft_model(model, config)
    if order != "attach_first":
        fastpo.attach(wrapped)
    output, ours = step(wrapped, inputs)
    assert output.logits is None
    with wrapped.disable_adapter():
        without = wrapped(**inputs).loss.detach()
    model._fastpo.detach()
    _, own = step(wrapped, inputs)
    assert_same(ours, own)
    assert any("lm_head" in name for name in ours) == (head is not None)
    with wrapped.disable_adapter():
        assert_same(without, wrapped(**inputs).loss.detach())


@pytest.mark.parametrize("attach_first", [True, False])
def test_an_unknown_adapter_on_the_head_is_refused(attach_first):
    peft = pytest.importorskip("peft")
    model = tiny.model("llama")
    config = peft.LoHaConfig(target_modules=["q_proj", "lm_head"])
    if attach_first:
        fastpo.attach(model)
        call = peft.get_peft_model(model, config).forward
        with pytest.raises(
            RuntimeError, match=r"expected a head of LoRA, got an adapter of type peft"
        ):
            call(**tiny.batch())
    else:
        with pytest.raises(
            RuntimeError, match=r"expected a head of LoRA, got an adapter of type peft"
        ):
            fastpo.attach(peft.get_peft_model(model, config))


class _OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _custom_head(model):
    model.lm_head = _OwnForward(32, model.config.vocab_size)


def _custom_loss(model):
    model.loss_function = lambda logits, labels, vocab_size: logits.mean()


def _offloaded(model):
    model.lm_head.to("meta")


REFUSED_MODELS = {
    "no transformers model": (lambda: nn.Linear(2, 2), ValueError, "expected a transformers model"),
    "no head": (lambda: tiny.model("llama").model, RuntimeError, "torch.nn.Linear"),
    "foreign head": (_custom_head, RuntimeError, "torch.nn.Linear.*_OwnForward"),
    "loss function": (_custom_loss, RuntimeError, "expected ForCausalLMLoss, got <lambda>"),
    "offloaded": (_offloaded, RuntimeError, "expected a tensor in memory"),
    "twice": (fastpo.attach, ValueError, "without a fastpo head"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_refused_at_once(case):
    spoil, error, message = REFUSED_MODELS[case]
    if case in ("no transformers model", "no head"):
        model = spoil()
    else:
        model = tiny.model("llama")
        spoil(model)
    with pytest.raises(error, match=message):
        fastpo.attach(model)


def test_options_are_checked():
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got 0"):
        fastpo.attach(tiny.model("llama"), temperature=0)
    with pytest.raises(ValueError, match=r"outputs: expected a tuple of .*, got 'logps'"):
        fastpo.attach(tiny.model("llama"), outputs="logps")


class _Masked(transformers.LlamaForCausalLM):
    """Chameleon's habit: some words are never said."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        logits[..., 5:9] = torch.finfo(logits.dtype).min
        loss = self.loss_function(logits, labels, self.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class _OwnLoss(transformers.LlamaForCausalLM):
    """Bart's habit: cross-entropy written out."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        loss = nn.functional.cross_entropy(logits.view(-1, self.vocab_size), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class _Shortened(transformers.LlamaForCausalLM):
    """Blip-2's habit: the text is only the end of what the head sees."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        loss = self.loss_function(logits[:, 2:], labels, self.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Masked, "changes its logits in another way than logit_scale=1.0, softcap=None"),
        (_OwnLoss, "its forward fails on a probe"),
        (_Shortened, r"its loss sees logits of shape \(1, 1, 3\d\d\)"),
    ],
)
def test_unknown_forwards_are_refused_at_the_first_call(kind, message):
    model = tiny.model("llama")
    model.__class__ = kind
    fastpo.attach(model)
    with pytest.raises(RuntimeError, match=message):
        model(**tiny.batch())


def test_wrong_labels_are_the_callers_mistake():
    model, inputs = tiny.model("llama"), tiny.batch()
    fastpo.attach(model)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\d\d\), got 1000"):
        model(**inputs, shift_labels=torch.full((3, 12), 1000))
    with pytest.raises(ValueError, match=r"labels: expected shape \(3, 12\), got \(3, 10\)"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"][:, 2:])


def test_gradient_checkpointing():
    model, inputs = tiny.model("llama").train(), tiny.batch()
    _, own = step(model, inputs)
    model.gradient_checkpointing_enable()
    fastpo.attach(model)
    assert_same(step(model, inputs)[1], own)


def test_device_map_hooks():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny.model("llama"), tiny.batch()
    _, own = step(model, inputs)
    places = {"model": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    hooked = model.lm_head.forward
    fastpo.attach(model)
    output, ours = step(model, inputs)
    assert output.logits is None
    assert_same(ours, own)
    assert model.lm_head.forward is hooked


def test_a_deep_copy_has_a_head_of_its_own():
    model, inputs = tiny.model("llama"), tiny.batch()
    handle = fastpo.attach(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    uniform = torch.tensor(float(twin.config.vocab_size)).log()
    assert_same(twin(**inputs).loss.detach(), uniform)
    assert model(**inputs).loss > uniform + 0.5
    handle.detach()
    assert twin(**inputs).logits is None


def test_pickles():
    model, inputs = tiny.model("llama"), tiny.batch()
    fastpo.attach(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**inputs).logps, model(**inputs).logps)
    assert torch.equal(twin(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)


def test_autocast():
    """float32 weights under bfloat16 autocast: the products take its dtype."""
    model, inputs = tiny.model("llama"), tiny.batch()
    _, truth = step(copy.deepcopy(model).double(), inputs)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, inputs)[1]

    eager = run()
    fastpo.attach(model)
    fused = run()
    for name, value in truth.items():
        assert_as_good_as_eager(name, fused[name], eager[name], value)


def test_no_logits_exist(monkeypatch):
    calls = tiny.count_calls(monkeypatch)
    words, rows, length = 6000, 10, 70
    model = tiny.model("llama", vocab_size=words)
    inputs = {"input_ids": torch.randint(0, words, (rows, length))}
    inputs["labels"] = inputs["input_ids"]

    def widest():
        with tiny.Widest() as seen:
            model(**inputs).loss.backward()
        return seen.elements

    logits = rows * (length - 1) * words
    assert widest() >= logits
    fastpo.attach(model, budget=0)
    assert widest() <= logits * 2 // 3
    assert [spec.head_grad for spec in calls] == [True]


def test_transformers_trainer(tmp_path):
    def train(attached):
        model = tiny.model("gemma2")
        if attached:
            fastpo.attach(model)
        columns = tiny.batch(rows=12)
        rows = [{key: column[i] for key, column in columns.items()} for i in range(12)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.05,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        ignored = ["logits", "past_key_values"] if attached else None
        prediction = trainer.predict(rows[:4], ignore_keys=ignored)
        return losses, dict(model.named_parameters()), prediction

    own, ours = train(attached=False), train(attached=True)
    assert len(ours[0]) == 3
    assert ours[0] == pytest.approx(own[0], rel=1e-5)
    torch.testing.assert_close(ours[1], own[1], rtol=1e-4, atol=1e-5)
    assert ours[2].metrics["test_loss"] == pytest.approx(own[2].metrics["test_loss"], rel=1e-5)
    assert ours[2].predictions.shape == (4, 11)

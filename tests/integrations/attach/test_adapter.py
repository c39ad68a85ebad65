"""LoRA and DoRA on `lm_head`: the same losses and gradients as the model's own forward."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import _tiny as tiny
import peft
import torch
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.adapter import operands, unsupported
from fastpo.integrations.lazy.logits import LazyLogits
from fastpo.ops.shards.gathered import HeadOptions, score

ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def adapted_model(name="lora", model="llama", **changes):
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "lm_head"], **changes}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings, **ADAPTERS[name])
    built = peft.get_peft_model(tiny.model(model), config)
    randomize(built)
    return built


def randomize(model):
    """Adapters start as zero, where mistakes hide."""
    torch.manual_seed(5)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("mode", ["keep", "lean"])
@pytest.mark.parametrize("model", ["llama", "phi", "gemma2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_layer_s_own_products(name, model, mode):
    built = adapted_model(name, model).get_base_model()
    head = built.get_output_embeddings()
    torch.manual_seed(1)
    hidden = torch.randn(7, 32, requires_grad=True)
    labels = torch.arange(7)
    trained = [p for p in head.parameters() if p.requires_grad]
    own = torch.log_softmax(head(hidden), -1)[range(7), labels]
    weights = torch.linspace(-1, 1, 7)
    expected = torch.autograd.grad((own * weights).sum(), [hidden, *trained])
    weight, adapter = operands(head, hidden)
    options = HeadOptions(budget=0 if mode == "lean" else 2**40)
    found = score(hidden, weight, head.bias, labels, options, adapter=adapter).logps
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((found * weights).sum(), [hidden, *trained])
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_16_bits_under_autocast_of_the_other_kind():
    """Which refuses to concatenate them."""
    built = adapted_model().bfloat16()
    inputs = tiny.batch()
    with torch.autocast("cpu", torch.float16):
        own = built(**inputs).loss
        fastpo.attach(built)
        assert torch.allclose(built(**inputs).loss, own, rtol=0.02)
        head, hidden = built.get_output_embeddings(), torch.randn(7, 32).bfloat16()
        weight, adapter = operands(head, hidden)
        given = hidden, weight, None, torch.arange(7), HeadOptions()
        found = score(*given, adapter=adapter).logps
        own = head(hidden).float().log_softmax(-1)[range(7), range(7)]
    torch.testing.assert_close(found, own, rtol=0.02, atol=0.02)


def test_base_weight_and_adapter_may_both_train():
    head = adapted_model().get_base_model().get_output_embeddings()
    head.weight.requires_grad_(True)
    torch.manual_seed(1)
    hidden, labels = torch.randn(7, 32), torch.arange(7)
    trained = list(head.parameters())
    own = torch.log_softmax(head(hidden), -1)[range(7), labels].sum()
    weight, adapter = operands(head, hidden)
    found = score(hidden, weight, None, labels, HeadOptions(), adapter=adapter).logps.sum()
    expected = torch.autograd.grad(own, trained)
    torch.testing.assert_close(torch.autograd.grad(found, trained), expected, rtol=1e-4, atol=1e-5)


def test_several_disabled_and_merged_adapters():
    built = adapted_model()
    built.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    randomize(built)
    built.base_model.set_adapter(["default", "second"])
    head = built.get_base_model().get_output_embeddings()
    hidden = torch.randn(5, 32)
    changes = [lambda: None, head.merge, lambda: head.enable_adapters(False), lambda: None]
    for change in changes:
        change()
        weight, adapter = operands(head, hidden)
        products = hidden @ weight.t()
        if adapter is not None:
            products = products + adapter[0] @ adapter[1].t()
        torch.testing.assert_close(products, head(hidden), rtol=1e-5, atol=1e-5)


def test_a_trained_copy_of_tied_embeddings():
    """PEFT makes the head a layer whose two numbers of features are the wrong way round."""
    pytest.importorskip("peft", minversion="0.18")
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = peft.get_peft_model(
        tiny.model("llama_tied"), peft.LoraConfig(**settings, ensure_weight_tying=True)
    )
    inputs = tiny.batch()
    loss = model(**inputs).loss
    fastpo.attach(model)
    torch.testing.assert_close(model(**inputs).loss, loss)


def test_rows_of_several_adapters():
    """`adapter_names` reach the head: its logits, where they can be, and else an error."""
    model, inputs = adapted_model().eval(), tiny.batch()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    randomize(model)
    inputs["adapter_names"] = ["default", "second", "__base__"]
    logits = model(**inputs).logits
    with fastpo.lazy_logits(model):
        assert torch.equal(model(**inputs).logits, logits)
    fastpo.attach(model)
    with pytest.raises(RuntimeError, match="its forward gives the head adapter_names"):
        model(**inputs)


def test_what_fastpo_cannot_score_through():
    def reason(**settings):
        return unsupported(adapted_model(**settings).get_base_model().get_output_embeddings())

    assert reason() is None
    assert reason(lora_bias=True) == "lora_bias=True"
    plain = tiny.model("llama")
    loha = peft.get_peft_model(plain, peft.LoHaConfig(r=2, target_modules=["lm_head"]))
    head = loha.get_base_model().get_output_embeddings()
    assert unsupported(head).startswith("an adapter of type peft.tuners.loha")


def test_hooks_on_layers_that_do_not_run_are_refused():
    model = adapted_model().get_base_model()
    head, inputs = model.get_output_embeddings(), tiny.batch()
    down, up = head.lora_A["default"], head.lora_B["default"]
    down.register_forward_hook(lambda layer, given, output: output * 2)
    loss = model(**inputs).loss
    fastpo.attach(model)
    torch.testing.assert_close(model(**inputs).loss, loss)
    for layer in (head.base_layer, up):
        hook = layer.register_forward_hook(halved)
        with pytest.raises(RuntimeError, match="got a hook halved on one of its layers"):
            model(**inputs)
        hook.remove()
    hook = head.register_full_backward_hook(halved)
    with pytest.raises(RuntimeError, match="expected no backward hook, got halved"):
        model(**inputs)


@pytest.mark.parametrize("around", ["a copy of PEFT's", "a compiler"])
def test_backward_hooks_on_what_is_around_the_head_are_refused(around):
    model, inputs = tiny.model("llama"), tiny.batch()
    if around == "a compiler":
        model.lm_head = torch.compile(model.lm_head, backend="eager")
    else:
        saved = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(model, saved).get_base_model()
    with fastpo.attach(model):
        model.lm_head.register_full_backward_pre_hook(halved_gradient)
        with pytest.raises(RuntimeError, match="expected no backward hook, got halved_gradient"):
            model(**inputs)
    with fastpo.lazy_logits(model):
        assert not isinstance(model(**inputs).logits, LazyLogits)


def halved_gradient(layer, given):
    return (given[0] / 2,)


def halved(layer, given, output):
    return output / 2


def test_dora_with_dropout_is_refused_while_training():
    head = adapted_model("dora", lora_dropout=0.5).get_base_model().get_output_embeddings()
    with pytest.raises(RuntimeError, match="DoRA adapter without dropout"):
        operands(head.train(), torch.randn(3, 32))


def logits_of_one_seed(model):
    torch.manual_seed(3)
    return model(tiny.batch()["input_ids"]).logits


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("why", ["dropout", "another adapter"])
def test_lazy_logits_give_way_to_dora_they_cannot_read(why, caplog):
    """As to any head they do not know: the script trains as without them."""
    dropout = 0.5 if why == "dropout" else 0.0
    built = adapted_model("dora", lora_dropout=dropout).train()
    if why == "another adapter":
        built.add_adapter("more", peft.LoraConfig(r=4, target_modules=["lm_head"]))
        built.base_model.set_adapter(["default", "more"])
    expected = logits_of_one_seed(built)
    with fastpo.lazy_logits(built):
        found = logits_of_one_seed(built)
        assert type(found) is torch.Tensor and torch.equal(found, expected)
        if why == "dropout":
            assert isinstance(logits_of_one_seed(built.eval()), LazyLogits)
    assert "expected one DoRA adapter without dropout" in caplog.text


# TRL's trainers

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def dpo_trainer(folder, **lora):
    trl = pytest.importorskip("trl")
    tiny.model("llama").save_pretrained(folder / "model")
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], **lora}
    return trl.DPOTrainer(
        model=str(folder / "model"),
        args=trl.DPOConfig(output_dir=str(folder), **SETTINGS),
        train_dataset=tiny.preferences(),
        processing_class=tiny.tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **settings),
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_dpo_trains_an_adapter_on_the_head(use_dora, tmp_path):
    pytest.importorskip("trl", minversion="1.13")  # and not a folder of tests of that name
    with fastpo.patched():
        trainer = dpo_trainer(tmp_path, use_dora=use_dora)
        randomize(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(named.values()))
        mask = batch["completion_mask"][:, 1:].bool()
        own = margin(trainer.model, batch, mask)
        with torch.no_grad(), trainer.model.disable_adapter():
            reference = margin(trainer.model, batch, mask)
        expected = -torch.nn.functional.logsigmoid(0.1 * (own - reference)).mean()
        own_grads = torch.autograd.grad(expected, list(named.values()))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert any("lm_head" in name for name in named)
        torch.testing.assert_close(grads, own_grads, rtol=1e-3, atol=1e-5)
        trainer.train()


def margin(model, batch, mask):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["input_ids"][:, 1:, None]
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, labels).squeeze(-1)
    chosen, rejected = (tokens * mask).sum(1).chunk(2)
    return chosen - rejected


def test_trl_s_own_head_never_runs_without_the_adapter(tmp_path):
    pytest.importorskip("trl", minversion="1.15")  # older ones call the adapter
    with fastpo.patched():
        trainer = dpo_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="ignores the adapter on lm_head"):
        trainer.train()


def test_what_is_not_supported_stays_refused(tmp_path):
    pytest.importorskip("trl", minversion="1.15")  # older ones refuse none
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head`"):
        dpo_trainer(tmp_path)
    with fastpo.patched(), pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head`"):
        dpo_trainer(tmp_path, lora_bias=True)


def test_a_head_that_trl_casts_past_the_adapter_is_refused(tmp_path):
    """Completions would come from another policy than the one that learns of them."""
    trl = pytest.importorskip("trl", minversion="1.15")
    settings = {**SETTINGS, "num_generations": 2, "cast_lm_head_to_fp32": True}
    with fastpo.patched(), pytest.raises(ValueError, match="expected False with an adapter on lm"):
        trl.GRPOTrainer(
            model=tiny.model(),
            reward_funcs=len,
            args=trl.GRPOConfig(output_dir=str(tmp_path), **settings),
            train_dataset=tiny.prompts(),
            processing_class=tiny.tokenizer(),
            peft_config=peft.LoraConfig(target_modules=["lm_head"]),
        )


INJECTED = {
    "bias": (peft.LoraConfig(lora_bias=True, target_modules=["lm_head"]), "lora_bias=True"),
    "loha": (peft.LoHaConfig(r=2, target_modules=["lm_head"]), "loha.layer.Linear"),
}


@pytest.mark.parametrize("name", INJECTED)
def test_what_is_injected_is_refused_too(name, tmp_path):
    """Into a model of transformers: TRL asks a PeftModel only, and would ignore it."""
    trl = pytest.importorskip("trl", minversion="1.15")
    config, got = INJECTED[name]
    with fastpo.patched(), pytest.raises(ValueError, match=f"expected an adapter of LoRA.*{got}"):
        trl.SFTTrainer(
            model=peft.inject_adapter_in_model(config, tiny.model()),
            args=trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS),
            train_dataset=tiny.conversations(),
            processing_class=tiny.tokenizer(),
        )

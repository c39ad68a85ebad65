"""TRL's trainers that build logits: the same losses, metrics and parameters, without them."""

from __future__ import annotations

import contextlib
import importlib
import warnings

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import trl
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo import planner
from fastpo.integrations import _lazy_logits, _trl_logits


def gold():
    return tiny.preferences().map(lambda row: {"reference": row["chosen"]})


def reward(completions, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 2) for text in texts]


def lora():
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])}


def online():
    return {"reward_funcs": reward}


SAMPLED = {"max_new_tokens": 4, "temperature": 0.9}
# name: (trainer, data, model, config on top, arguments of the trainer)
TRAINERS = {
    "cpo": ("CPO", tiny.preferences, "llama", {}, dict),
    "cpo_hinge": ("CPO", tiny.preferences, "phi", {"loss_type": "hinge"}, dict),
    "cpo_ipo": ("CPO", tiny.preferences, "llama_tied", {"loss_type": "ipo"}, dict),
    "simpo": (
        "CPO",
        tiny.preferences,
        "cohere",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
        dict,
    ),
    "alphapo": ("CPO", tiny.preferences, "granite", {"loss_type": "alphapo", "alpha": 0.1}, dict),
    "cpo_moe": ("CPO", tiny.preferences, "qwen2_moe", {}, dict),
    "cpo_lora": ("CPO", tiny.preferences, "llama", {}, lora),
    "orpo": ("ORPO", tiny.preferences, "gemma2", {}, dict),
    "tpo": ("TPO", gold, "llama", {}, dict),
    "tpo_l": ("TPO", gold, "llama", {"loss_type": "tpo-l", "tpo_alpha": 0.0}, dict),
    "a2po": (
        "A2PO",
        tiny.prompts,
        "llama",
        {"max_completion_length": 4, "num_value_samples": 2},
        online,
    ),
    "online_dpo": ("OnlineDPO", tiny.prompts, "llama", SAMPLED, online),
    "sft_smoothed": ("SFT", tiny.conversations, "llama", {"label_smoothing_factor": 0.1}, dict),
}
MODULES = {"OnlineDPO": "online_dpo"}
TIMINGS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}


def classes(prefix):
    if hasattr(trl, f"{prefix}Trainer"):
        return getattr(trl, f"{prefix}Trainer"), getattr(trl, f"{prefix}Config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's notice that its experiments may change
        module = importlib.import_module(f"trl.experimental.{MODULES.get(prefix, prefix.lower())}")
    return getattr(module, f"{prefix}Trainer"), getattr(module, f"{prefix}Config")


def trainer(name, folder):
    prefix, data, model, changes, arguments = TRAINERS[name]
    kind, config = classes(prefix)
    path = folder / "model"
    if not path.exists():
        tiny.model(model).save_pretrained(path)
    extra = arguments()
    return kind(
        model=tiny.model(model) if prefix in ("CPO", "ORPO") else str(path),
        args=config(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **changes,
        ),
        train_dataset=data(),
        processing_class=tiny.tokenizer(),
        **extra,
    )


def trained(name, folder):
    built = trainer(name, folder)
    built.train()
    logs = [
        {key: value for key, value in log.items() if key not in TIMINGS}
        for log in built.state.log_history
    ]
    return logs, {n: p.detach().clone() for n, p in built.model.named_parameters()}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setattr(_lazy_logits, "_told", set())
    own_logs, own = trained(name, tmp_path)
    calls = tiny.count_calls(monkeypatch)
    with fastpo.patched():
        logs, ours = trained(name, tmp_path)
    assert len(calls) >= 3
    assert not _lazy_logits._told, "nothing computes full logits"
    assert len(logs) == len(own_logs) == 4
    for log, own_log in zip(logs, own_logs, strict=True):
        assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cpo", "orpo", "tpo", "sft_smoothed"])
def test_no_tensor_is_wider_than_the_head(name, tmp_path, monkeypatch):
    """Full logits would be: 4 rows of about 20 tokens times V, against V times 32."""
    small = planner.Tiles(8, 64)
    monkeypatch.setattr(planner, "tile_shape", lambda *_: small)
    widths = {}
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            built = trainer(name, tmp_path)
            batch = next(iter(built.get_train_dataloader()))
            with tiny.Widest() as widest:
                built.compute_loss(built.model, batch).backward()
        widths[patched] = widest.elements
    head = built.model.lm_head.weight.numel()
    assert widths[True] <= head < widths[False]


@pytest.mark.parametrize("name", ["cpo", "tpo"])
def test_evaluation_hands_out_real_logits(name, tmp_path):
    with fastpo.patched():
        built = trainer(name, tmp_path)
        batch = next(iter(built.get_train_dataloader()))
        _, logits, _ = built.prediction_step(built.model, batch, prediction_loss_only=False)
    assert isinstance(logits, torch.Tensor)


def test_a_head_fastpo_does_not_know_stays_itself(tmp_path, caplog):
    class Own(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    _trl_logits._say_once.cache_clear()
    with fastpo.patched():
        built = trainer("cpo", tmp_path)
        built.model.lm_head.__class__ = Own
        built.train()
    assert built.state.global_step == 3
    assert [r.message for r in caplog.records if "keeps its full logits" in r.message] == [
        "fastpo: CPOTrainer keeps its full logits: LlamaForCausalLM.get_output_embeddings(): "
        f"expected a torch.nn.Linear without quantisation, got {Own.__module__}.Own"
    ]


def test_everything_is_given_back():
    kind, _ = classes("CPO")
    module = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    before = {name: vars(kind)[name] for name in ("concatenated_forward", "get_batch_logps")}
    select = module.selective_log_softmax
    with fastpo.patched():
        assert vars(kind)["concatenated_forward"] is not before["concatenated_forward"]
        assert module.selective_log_softmax is not select
    assert {name: vars(kind)[name] for name in before} == before
    assert all(vars(kind)[name] is value for name, value in before.items())
    assert module.selective_log_softmax is select

"""`fastpo.patch` where every process holds a part of each weight: FSDP2, DeepSpeed ZeRO-3."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from importlib.util import find_spec

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import _trainers
import torch
from _sharding import shard_on_a_cpu, whole
from transformers import training_args
from trl.trainer import distillation_trainer

import fastpo
from fastpo.integrations.lazy import head as lazy_module
from fastpo.integrations.lazy.head import lazy_head
from fastpo.integrations.lazy.logits import LazyLogits
from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.trl.head import HeadCall
from fastpo.ops.shards.gathered import HeadOptions
from fastpo.ops.walks import divergence
from fastpo.ops.walks import forward as driver
from fastpo.testing import assert_as_good_as_eager, rounding


def teacher(folder):
    """By its path: DeepSpeed also shards a model that is made while its configuration is alive."""
    return {"teacher_model": _trainers.saved(folder / "gemma2", "gemma2")}


def lora(folder):
    return {"peft_config": _trainers.lora()}


def lora_head(folder):
    return {"peft_config": _trainers.lora(target_modules=["q_proj", "lm_head"])}


def dora_head(folder):
    return {"peft_config": _trainers.lora(target_modules=["lm_head"], use_dora=True)}


def rewarded(folder):
    return {"reward_funcs": _trainers.reward}


def nothing(folder):
    return {}


# name: (TRL's prefix, data, model, config on top, arguments of the trainer)
TRAINERS = {
    "dpo": ("DPO", tiny.preferences, "llama", {}, nothing),
    "dpo_tied": (
        "DPO",
        tiny.preferences,
        "gemma2",
        {"gradient_accumulation_steps": 2},
        nothing,
    ),
    "dpo_lora": ("DPO", tiny.preferences, "llama", {}, lora),
    "dpo_lora_head": ("DPO", tiny.preferences, "llama", {}, lora_head),
    "dpo_dora_head": ("DPO", tiny.preferences, "llama", {}, dora_head),
    "dpo_objective": ("DPO", tiny.preferences, "llama", {}, nothing),
    "sft": ("SFT", tiny.conversations, "phi", {}, nothing),
    "kto": ("KTO", tiny.unpaired, "llama_tied", {"per_device_train_batch_size": 2}, nothing),
    "grpo": (
        "GRPO",
        tiny.prompts,
        "llama",
        {
            "num_generations": 2,
            "max_completion_length": 4,
            "beta": 0.1,
            "per_device_train_batch_size": 2,
        },
        rewarded,
    ),
    "distillation": ("Distillation", tiny.prompts, "llama", {"max_completion_length": 4}, teacher),
    "cpo": ("CPO", tiny.preferences, "llama", {}, nothing),
    "orpo": ("ORPO", tiny.preferences, "gemma2", {"gradient_accumulation_steps": 2}, nothing),
    "cpo_lora": ("CPO", tiny.preferences, "llama", {}, lora),
    "cpo_lora_head": ("CPO", tiny.preferences, "llama", {}, lora_head),
    "gkd": ("GKD", tiny.conversations, "llama", {"lmbda": 0.0}, teacher),
    "sft_smoothed": ("SFT", tiny.conversations, "phi", {"label_smoothing_factor": 0.1}, nothing),
}
if not hasattr(distillation_trainer, "ChunkedDivergenceFunction"):
    del TRAINERS["distillation"]  # TRL 1.15 has no function of its own there
# Which TRL alone does not train: how fastpo is put under it, whole and sharded.
OURS_ALONE = {
    "dpo_lora_head": {},
    "dpo_dora_head": {},
    "dpo_objective": {"objective": "simpo"},
}
# Adapters on the head, where TRL's refusal stands, and SFT, of which a part runs through fastpo.
NO_ZERO = ("dpo_lora_head", "dpo_dora_head", "cpo_lora_head", "sft_smoothed")
# What is said of trainers that keep their logits, or their own divergence.
ALONE_FSDP = {"cpo_lora_head": "expected no adapter on a shard, got one"}
ALONE_ZERO = dict.fromkeys(
    ("cpo", "orpo", "cpo_lora", "gkd", "distillation"),
    "expected a whole tensor, got a shard",
)
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
ZERO = {
    "deepspeed": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
}
HALVES = ("dpo", "cpo", "gkd", "sft_smoothed")  # run in mixed precision, too
WHOLE = {"use_cpu": True, "ddp_backend": "gloo"}


def train(name, folder, changes):
    prefix, data, model, own, arguments = TRAINERS[name]
    path = _trainers.saved(folder / model, model)
    settings = {"per_device_train_batch_size": 1, "max_steps": 2, "use_cpu": False}
    settings |= {**own, **changes}
    trainer = _trainers.build(prefix, folder, path, data(), settings, **arguments(folder))
    logs, _ = _trainers.train(trainer)
    logs[-1].pop("total_flos")  # transformers counts the numbers this process holds
    weights = dict(trainer.model.named_parameters())
    return logs, {n: whole(p) for n, p in weights.items()}, {n: held(p) for n, p in weights.items()}


def held(parameter):
    """How many numbers of it this process holds."""
    shard = getattr(parameter, "ds_tensor", parameter)
    return getattr(shard, "_local_tensor", shard).numel()


def process(rank, names, folder, sharded):
    """Each trainer whole, sharded, and sharded with the patch."""
    calls, warnings, runs = count(), heard(), {}
    for name in names:
        with fastpo.patched(**OURS_ALONE[name]) if name in OURS_ALONE else nullcontext():
            runs[name, "whole"] = train(name, folder, WHOLE)
    shard_on_a_cpu()
    for name in names:
        if name not in OURS_ALONE:
            runs[name, "own"] = train(name, folder, sharded)
        calls.clear()
        say_once.cache_clear()
        with fastpo.patched(**OURS_ALONE.get(name, {})):
            runs[name, "ours"] = train(name, folder, sharded)
        runs[name, "calls"], runs[name, "warnings"] = len(calls), list(warnings)
        warnings.clear()
    for name in HALVES if "fsdp" in sharded else ():
        training_args.is_torch_bf16_gpu_available = lambda: True
        for kind, patch in {"own": nullcontext, "ours": fastpo.patched}.items():
            with patch():
                runs[name, kind, "bf16"] = train(name, folder, {**sharded, "bf16": True})
    torch.save(runs, folder / f"{rank}.pt")


def count():
    """An entry for each run of a primitive."""
    calls = []
    for module in (driver, divergence):
        forward = module.forward
        module.forward = lambda *x, forward=forward: calls.append(len(x)) or forward(*x)
    return calls


def heard():
    """Warnings of fastpo's."""
    messages, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("fastpo").addHandler(handler)
    return messages


def trained(folder, sharded, seconds):
    names = [name for name in TRAINERS if sharded is FSDP or name not in NO_ZERO]
    for model in {"gemma2", *(TRAINERS[name][2] for name in names)}:
        _trainers.saved(folder / model, model)
    _processes.run(process, names, folder, sharded, seconds=seconds)
    return torch.load(folder / "0.pt"), torch.load(folder / "1.pt")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("fsdp"), FSDP, 240)


@pytest.mark.parametrize("name", TRAINERS)
def test_fsdp2(name, fsdp):
    assert_trained_the_same(name, fsdp, ALONE_FSDP)


@pytest.mark.parametrize("name", HALVES)
def test_fsdp2_in_mixed_precision(name, fsdp):
    """At most twice as far from float32 as TRL alone, or half a last place; weights thrice."""
    logs, weights, _ = fsdp[0][name, "whole"]
    own_logs, own_weights, _ = fsdp[0][name, "own", "bf16"]
    our_logs, our_weights, _ = fsdp[0][name, "ours", "bf16"]
    for key in ("loss", "grad_norm"):
        truth, own, ours = (
            torch.tensor([log[key] for log in each if key in log])
            for each in (logs, own_logs, our_logs)
        )
        assert_as_good_as_eager(key, ours, own, truth, slack=rounding(truth, torch.bfloat16))
    for key, truth in weights.items():
        assert our_weights[key].dtype == truth.dtype
        assert_as_good_as_eager(key, our_weights[key], own_weights[key], truth, factor=3)


def assert_trained_the_same(name, ranks, left_alone):
    first, second = ranks
    *whole, everything = first[name, "whole"]
    *ours, part = first[name, "ours"]
    assert sum(part.values()) < 0.6 * sum(everything.values()), "every weight is sharded"
    _trainers.assert_same(ours, whole)
    if name not in OURS_ALONE:
        _trainers.assert_same(ours, first[name, "own"][:2])
    torch.testing.assert_close(second[name, "ours"][1], ours[1], rtol=0, atol=0)
    if name in left_alone:
        assert first[name, "calls"] == 0
        (warning,) = first[name, "warnings"]
        assert left_alone[name] in warning
    else:
        assert first[name, "calls"] >= 2
        assert not first[name, "warnings"]


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """Its first run on a machine compiles an operator of DeepSpeed's for minutes."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    return trained(tmp_path_factory.mktemp("zero"), ZERO, 400)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("name", [name for name in TRAINERS if name not in NO_ZERO])
def test_zero_3(name, zero):
    assert_trained_the_same(name, zero, ALONE_ZERO)


def test_logits_of_heads_that_cannot_be_read_later_are_left_alone(caplog, monkeypatch):
    model, hidden = tiny.model("llama"), torch.randn(2, 3, 32)
    say_once.cache_clear()
    own = model.lm_head.weight
    model.lm_head._is_fsdp_managed_module = True
    model.lm_head.weight = torch.nn.Parameter(own.detach().flatten())  # as FSDP1 has it
    with lazy_head("a test", model):
        assert "forward" not in vars(model.lm_head)
    assert "got a shard of FSDP1" in caplog.text
    model.lm_head.weight = own
    with lazy_head("a test", model):
        assert isinstance(model.lm_head(hidden), LazyLogits)
    monkeypatch.setattr(lazy_module, "tensor_parallel", lambda head: True)
    with lazy_head("a test", model):
        assert not isinstance(model.lm_head(hidden), LazyLogits)
    assert "got a tensor-parallel shard" in caplog.text


@pytest.mark.parametrize("framework", ["fsdp2", "zero_3"])
def test_a_head_gone_after_the_forward_cannot_be_read_again(framework):
    """Objectives of two heads at once ask for it."""
    weight = torch.randn(7, 4)
    call = HeadCall(torch.randn(3, 4), weight, None, None, torch.arange(3), HeadOptions())
    assert call.operands[1] is weight
    if framework == "fsdp2":
        weight.untyped_storage().resize_(0)
    else:
        weight.ds_id = 0
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: expected .*, got a shard"):
        call.operands  # noqa: B018

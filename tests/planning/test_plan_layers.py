"""All layers from a few: what `fastpo plan` runs tells the bytes of the whole model."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")

import torch
import transformers
from _plans import LLAMA, SIZES
from transformers import (
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    LongcatFlashConfig,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen3MoeConfig,
)

import fastpo
from fastpo.planning.estimate import Estimate, Session
from fastpo.planning.fits import Depths, cut, depths
from fastpo.planning.models import size_of
from fastpo.planning.setting import HEADS, Lora, Setting

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _windows(layers):
    return [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]


def _gemma4(layers, shared):
    """With keys of their own in the first layers only."""
    return Gemma4TextConfig(
        **SIZES, num_hidden_layers=layers, num_kv_shared_layers=shared,
        layer_types=["full_attention"] * layers, vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=16,
    )  # fmt: skip


TIED = LlamaConfig(**SIZES, num_hidden_layers=6, tie_word_embeddings=True)
SHARDS = {"devices": 2, "strategy": "fsdp2"}
CONFIGS = {
    "llama": (LLAMA, {}),
    "lora": (LLAMA, {"lora": Lora(), "devices": 2}),
    "checkpointed": (LLAMA, {"checkpointing": "layers", "context": 96, **SHARDS}),
    "shared": (LLAMA, {"prompt_rows": 2, "prompt": 0.8}),
    "tied": (TIED, {"context": 16}),  # a few layers hold less than the embeddings' gradient
}
UNLIKE = {
    "windows": Gemma3TextConfig(
        **SIZES, num_hidden_layers=7, sliding_window=16, layer_types=_windows(7)
    ),
    "experts in some": Qwen2MoeConfig(
        **SIZES, **EXPERTS, num_hidden_layers=7, decoder_sparse_step=2,
        shared_expert_intermediate_size=64,
    ),
    "dense ones first": Qwen3MoeConfig(
        **SIZES, **EXPERTS, num_hidden_layers=6, mlp_only_layers=[0, 1]
    ),
    "shared keys": _gemma4(6, 4),
    "last ones keep keys": _gemma4(5, 0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "fastpo") for name in CONFIGS), ("llama", "trl"), ("lora", "trl")]
)
def test_all_layers_from_a_few(name, head):
    _check_all_layers(name, head, *CONFIGS[name])


@pytest.mark.parametrize("name", UNLIKE)
def test_all_layers_from_a_few_of_each_kind(name):
    _check_all_layers(name, "fastpo", UNLIKE[name], {})


def _check_all_layers(name, head, config, options):
    setting = Setting(name, dtype="bf16", batch=3, **{"context": 48, **options})
    depths = Depths(setting, config, head)
    assert len(depths.sessions) == 2
    torch.manual_seed(0)  # where words are looked at
    whole = Session(setting, config, head)
    phases = whole.phases(setting)
    found = depths.estimate()
    assert found.phases == {phase: held.total() for phase, held in phases.items()}
    assert found == Estimate.of(head, setting, phases, whole.trained, whole.gathered)
    assert sum(found.parts.values()) == found.peak


DEEP = {
    "llama": (LlamaConfig(**SIZES, num_hidden_layers=40), [3, 4]),
    "interval": (
        Qwen2MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=24, decoder_sparse_step=2), [4, 6]
    ),
    "in between": (
        Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=24, mlp_only_layers=[5, 6, 7]),
        [10, 11],
    ),
    "first": (
        DeepseekV3Config(
            vocab_size=300, hidden_size=32, num_hidden_layers=20, first_k_dense_replace=5
        ),
        [7, 8],
    ),
    "two in a layer": (LongcatFlashConfig(vocab_size=300, hidden_size=32, num_layers=6), [12]),
    "shared keys": (_gemma4(30, 20), [12, 13]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_no_layers_are_taken_for_others(name):
    config, expected = DEEP[name]
    setting = Setting(name)
    kept = depths(setting, config)
    assert [len(x) for x in kept] == expected
    first, last = (size_of(setting, cut(config, x)) for x in (kept[0], kept[-1]))
    beyond = config.num_hidden_layers - len(kept[0])
    more = (last - first) * beyond // (len(kept[-1]) - len(kept[0])) if beyond else 0
    assert first + more == size_of(setting, config)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trainer", ["gkd", "distillation"])
def test_a_teacher_of_many_layers_from_a_few(trainer, head):
    teacher = copy.deepcopy(LLAMA)
    teacher.update({"hidden_size": 96, "num_hidden_layers": 5})
    student = copy.deepcopy(LLAMA)
    student.num_hidden_layers = 3
    setting = Setting("student", trainer=trainer, context=48, batch=2)
    whole = Session(setting, student, head, teacher).phases(setting)
    found = Depths(setting, student, head, teacher).estimate()
    assert found.phases == {phase: held.total() for phase, held in whole.items()}
    with torch.device("meta"):
        own = transformers.AutoModelForCausalLM.from_config(teacher, dtype=torch.bfloat16)
    expected = sum(x.numel() * x.itemsize for x in (*own.parameters(), *own.buffers()))
    assert found.parts["reference"] == expected


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SEEING = {
    "qwen2 vl": Qwen2VLConfig(
        text_config={**SIZES, "num_hidden_layers": 5, "rope_parameters": ROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    ),
    "gemma3": Gemma3Config(
        text_config={**SIZES, "num_hidden_layers": 5},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_towers_are_weights_and_trained_as_the_rest(name):
    """The step runs on text: what that does not reach has gradients and states all the same."""
    config = SEEING[name]
    options = {"trainer": "sft", "context": 32, "dtype": "fp32", "device": "cpu"}
    plan = fastpo.plan_step(config, search=False, **options)
    assert plan.notes[0].startswith("planned on text: ")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    weights = sum(4 * x.numel() for x in model.parameters())
    found = plan.heads["fastpo"].estimate
    assert found.parts["weights"] >= weights
    assert found.phases["optimizer"] >= 4 * weights  # with gradients and two states
    whole = Session(Setting(name, **options), config, "fastpo").phases(Setting(name, **options))
    assert found.phases == {phase: held.total() for phase, held in whole.items()}

"""Distillation with heads in shards, which stay in them: FSDP2 and tensor parallelism."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import _trainers
import torch
import torch.distributed as dist
from _sharding import shard_on_a_cpu, whole
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from trl.trainer import distillation_trainer

import fastpo
from fastpo.ops.walks import vocab_shard

TP = {"tp_plan": "auto"}
GIVEN = {"lmbda": 0.0, "beta": 0.3}
GOLD = {**GIVEN, "max_length": 64, "max_completion_length": 32}
EVALUATED = {**GIVEN, "eval_strategy": "steps", "eval_steps": 2}
SAMPLED = {"max_completion_length": 4}
LLAMA = ["LlamaDecoderLayer"]
# name: (TRL's prefix, student, config on top, what FSDP2 shards alone, is the teacher in shards?)
FSDP = {
    "gkd": ("GKD", "llama", GIVEN, LLAMA, False),
    "gkd_bias": ("GKD", "phi", GIVEN, ["PhiDecoderLayer"], False),
    "gkd_teacher": ("GKD", "llama", GIVEN, LLAMA, True),
    "gkd_evaluated": ("GKD", "llama", EVALUATED, LLAMA, False),
    "gkd_lora": ("GKD", "llama", {**GIVEN, "lora": True}, LLAMA, False),
    "gold": ("GOLD", "llama_tied", GOLD, LLAMA, False),
    "head_alone": ("Distillation", "llama", SAMPLED, [*LLAMA, "Linear"], False),
    "heads_alone": ("Distillation", "llama", SAMPLED, [*LLAMA, "Linear"], True),
}
FUSED = hasattr(distillation_trainer, "ChunkedDivergenceFunction")
if not FUSED:
    del FSDP["head_alone"], FSDP["heads_alone"]  # TRL 1.15 has no function of its own there
# name: (TRL's prefix, student, config on top, is the teacher tensor-parallel, too?)
PARALLEL = {
    "gkd": ("GKD", "llama", GIVEN, True),
    "gkd_bias": ("GKD", "phi", GIVEN, False),
    "gkd_sampled": ("GKD", "llama", {"lmbda": 1.0, "max_new_tokens": 4}, True),
    "gold": ("GOLD", "llama", GOLD, True),
}
WHOLE = {"use_cpu": True, "ddp_backend": "gloo"}
SHARDED = {"use_cpu": False}


def load(folder, name: str, **options):
    return AutoModelForCausalLM.from_pretrained(_trainers.saved(folder / name, name), **options)


def train(prefix, student, teacher, folder, settings):
    """The logs and whole weights, and how many exchanges of pairs of shards there were."""
    data = tiny.prompts() if prefix == "Distillation" else tiny.conversations()
    settings = {"per_device_train_batch_size": 1, "max_steps": 2, **settings}
    arguments = {"peft_config": _trainers.lora()} if settings.pop("lora", False) else {}
    if "eval_strategy" in settings:
        arguments |= {"eval_dataset": data, "compute_metrics": best}
    with exchanges() as calls:
        given = student, data, settings
        trainer = _trainers.build(prefix, folder, *given, teacher_model=teacher, **arguments)
        logs, _ = _trainers.train(trainer)
    logs[-1].pop("total_flos")  # transformers counts the numbers this process holds
    return logs, {n: whole(p) for n, p in trainer.model.named_parameters()}, len(calls)


def best(found):
    """Of full logits, which Trainer gathers of all processes."""
    return {"best": float(found.predictions.argmax(-1).mean())}


@contextmanager
def exchanges():
    calls, own = [], vocab_shard.VocabShard.merge_pair
    vocab_shard.VocabShard.merge_pair = lambda *x: calls.append(x) or own(*x)
    try:
        yield calls
    finally:
        vocab_shard.VocabShard.merge_pair = own


def fsdp(rank, folder):
    runs = {}
    for name, (prefix, student, own, _, _) in FSDP.items():
        settings = {**own, **WHOLE}
        runs[name, "whole"] = train(
            prefix, load(folder, student), load(folder, "gemma2"), folder, settings
        )
    shard_on_a_cpu()
    for name, (prefix, student, own, layers, sharded) in FSDP.items():
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        config["transformer_layer_cls_to_wrap"] = layers
        settings = {**own, **SHARDED, "fsdp": True, "fsdp_config": config}
        teacher = load(folder, "gemma2")
        if sharded:
            for part in (*teacher.model.layers, teacher):
                fully_shard(part)
        with fastpo.patched():
            runs[name, "ours"] = train(prefix, load(folder, student), teacher, folder, settings)
    torch.save(runs, folder / f"{rank}.pt")


def run(work, cases, folder):
    """What each process has saved, given the models of the cases."""
    for model in {"gemma2", *(student for _, student, *_ in cases.values())}:
        _trainers.saved(folder / model, model)
    _processes.run(work, folder, seconds=240)
    return _processes.loaded(folder)


@pytest.fixture(scope="module")
def under_fsdp(tmp_path_factory):
    return run(fsdp, FSDP, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", FSDP)
def test_under_fsdp2(name, under_fsdp):
    """As one model under DistributedDataParallel; TRL alone keeps, of the gradient of a head in a
    group of its own, what this process's tokens give."""
    first, second = under_fsdp
    *expected, calls = first[name, "whole"]
    assert calls == 0
    *ours, calls = first[name, "ours"]
    assert calls >= 2
    assert any("eval_best" in log for log in ours[0]) == (name == "gkd_evaluated")
    _trainers.assert_same(ours, expected)
    torch.testing.assert_close(second[name, "ours"][1], ours[1], rtol=0, atol=0)


def parallel(rank, folder):
    shard_on_a_cpu()
    dist.init_process_group("gloo")
    runs = {}
    for name, (prefix, student, own, also) in PARALLEL.items():
        models = load(folder, student, **TP), load(folder, "gemma2", **(TP if also else {}))
        with fastpo.patched():
            runs[name] = train(prefix, *models, folder, {**own, **SHARDED})
    if FUSED:
        models = load(folder, "llama", **TP), load(folder, "gemma2")
        with fastpo.patched(), pytest.raises(RuntimeError, match="a student that is not tensor-p"):
            train("Distillation", *models, folder, {**SAMPLED, **SHARDED})
    torch.save(runs, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def under_tensor_parallelism(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    return folder, *run(parallel, PARALLEL, folder)


@tiny.needs_tensor_parallelism
@pytest.mark.parametrize("name", PARALLEL)
def test_under_tensor_parallelism(name, under_tensor_parallelism):
    folder, *ranks = under_tensor_parallelism
    prefix, student, own, _ = PARALLEL[name]
    models = load(folder, student), load(folder, "gemma2")
    *expected, _ = train(prefix, *models, folder, {**own, "use_cpu": True})
    for rank in ranks:
        *ours, calls = rank[name]
        assert calls >= 2
        _trainers.assert_same(ours, expected)

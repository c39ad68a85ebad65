"""Heads in shards: `fastpo.attach` under FSDP2 and ZeRO-3, and DTensors given to the primitives."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import torch
import torch.distributed as dist
from _tiny import one_thread  # noqa: F401
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

import fastpo
from fastpo.ops.walks import vocab_shard

# name: (model, what `fully_shard` is called with before the model itself)
SHARDED = {
    "whole model": ("gemma2", lambda model: []),
    "layers": ("phi", lambda model: model.model.layers),
    "head alone": ("phi", lambda model: [*model.model.layers, model.lm_head]),
    "head and norm": ("llama", lambda model: [[model.model.norm, model.lm_head]]),
    "head and embeddings": (
        "gemma2",
        lambda model: [[model.model.norm, model.model.embed_tokens, model.lm_head]],
    ),
}
# name: (reshard_after_forward, rows of a batch); few tokens travel to the head, many let it travel
KINDS = {"kept": (None, 3), "resharded": (True, 3), "many tokens": (True, 16)}

# An untied head, a tied one with a soft-cap, one with a bias.
TENSOR_PARALLEL = ("llama", "gemma2", "phi")


def batches(rank, rows=3):
    """Two for each process: gradients are accumulated."""
    return [tiny.batch(seed=2 * rank + i, rows=rows) for i in range(2)]


def gradients(model, inputs):
    for one in inputs:
        model(**one).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: getattr(grad, "full_tensor", grad.clone)() for n, grad in trained.items()}


def fsdp(rank, folder):
    dist.init_process_group("gloo")
    found = {}
    for name, (model, parts) in SHARDED.items():
        for kind, (reshard, rows) in KINDS.items():
            built = tiny.model(model)
            for part in parts(built):
                fully_shard(part, reshard_after_forward=reshard is True)
            fully_shard(built, reshard_after_forward=reshard)
            fastpo.attach(built)
            found[name, kind] = gradients(built, batches(rank, rows))
    if find_spec("peft") is not None:
        found["adapter"] = gradients(sharded_head(adapted()), batches(rank))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    found["copies"] = gradients(sharded_head(tiny.model("llama"), mesh=mesh), batches(rank))
    model = sharded_head(tiny.model("llama"))
    model.lm_head.set_gradient_divide_factor(1.0)
    with pytest.raises(RuntimeError, match=r"set_gradient_divide_factor: expected none .* got 1.0"):
        model(**tiny.batch())
    torch.save(found, folder / f"{rank}.pt")


def sharded_head(model, **options):
    base = getattr(model, "get_base_model", lambda: model)()
    fully_shard([base.model.norm, base.lm_head], reshard_after_forward=True, **options)
    fully_shard(model, **options)
    fastpo.attach(model)
    return model


def adapted():
    """FSDP2 gives the layer on the head a class of its own."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["lm_head"], "init_lora_weights": False, "r": 2}
    return peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(**options))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attach")
    _processes.run(fsdp, folder)
    return torch.load(folder / "0.pt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHARDED)
def test_attached_model_under_fsdp2(name, kind, sharded):
    """The mean over processes, as the whole model's own loss gives it."""
    model = tiny.model(SHARDED[name][0])
    rows = KINDS[kind][1]
    own = gradients(model, [*batches(0, rows), *batches(1, rows)])
    assert any(grad.abs().max() > 0.1 for grad in own.values())
    own = {n: grad / _processes.PROCESSES for n, grad in own.items()}
    torch.testing.assert_close(sharded[name, kind], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adapter", "copies"])
def test_a_head_that_is_gathered_under_fsdp2(name, sharded):
    """With an adapter, and on a mesh of copies and shards."""
    own = gradients(
        tiny.model("llama") if name == "copies" else adapted(), [*batches(0), *batches(1)]
    )
    assert any("lora" in key for key in own) == (name == "adapter")
    own = {n: grad / _processes.PROCESSES for n, grad in own.items()}
    torch.testing.assert_close(sharded[name], own, rtol=1e-4, atol=1e-5)


def fewer_shards(rank, folder):
    """`lazy_logits`, too, where an earlier forward without gradient has left them."""
    dist.init_process_group("gloo")
    found = {}
    for name in ("own", "attach", "lazy_logits"):
        model = tiny.model("llama")
        fully_shard(model.lm_head, reshard_after_forward=2)
        fully_shard(model)
        if name != "own":
            getattr(fastpo, name)(model)
        with torch.no_grad():
            model(**tiny.batch())
        found[name] = gradients(model, batches(rank))
    torch.save(found, folder / f"{rank}.pt")


def test_a_head_in_fewer_shards_between_forward_and_backward(tmp_path):
    """Its gradient was lost: FSDP2 reads none of the parameter that it shows there."""
    _processes.run(fewer_shards, tmp_path, processes=4)
    found = torch.load(tmp_path / "0.pt")
    assert found["own"]["lm_head.weight"].abs().max() > 0.01
    for name in ("attach", "lazy_logits"):
        torch.testing.assert_close(found[name], found["own"], rtol=1e-4, atol=1e-5)


def tensor_parallel(rank, folder):
    dist.init_process_group("gloo")
    found = {}
    for name in TENSOR_PARALLEL:
        model = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto")
        assert model.lm_head.weight.placements == (Shard(0),)
        fastpo.attach(model)
        calls = count(vocab_shard.VocabShard, "merge")
        loss = model(**tiny.batch()).loss.detach()
        assert len(calls) == 1
        found[name] = loss, gradients(model, [tiny.batch()] * 2)
    torch.save(found, folder / f"{rank}.pt")


def count(owner, name):
    calls, own = [], getattr(owner, name)
    setattr(owner, name, lambda *arguments: calls.append(arguments) or own(*arguments))
    return calls


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for name in TENSOR_PARALLEL:
        tiny.model(name).save_pretrained(folder / name)
    _processes.run(tensor_parallel, folder)
    return _processes.loaded(folder)


@tiny.needs_tensor_parallelism
@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_attached_model_under_tensor_parallelism(name, parallel):
    """Each process has its own words, the same tokens and the whole loss."""
    model = tiny.model(name)
    own = model(**tiny.batch()).loss.detach(), gradients(model, [tiny.batch()] * 2)
    for rank in parallel:
        torch.testing.assert_close(rank[name], own, rtol=1e-4, atol=1e-5)


def test_a_head_of_parallelize_module_keeps_its_logits(mesh):
    """Its hooks expect DTensors: `lazy_logits` made the model fail."""
    model = tiny.model("llama")
    own = model(**tiny.batch()).logits
    style = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, {"lm_head": style})
    with pytest.raises(RuntimeError, match=r"lm_head: expected none of torch's parallelize_module"):
        fastpo.attach(model)
    with fastpo.lazy_logits(model):
        found = model(**tiny.batch()).logits
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, own)


def zero(rank, folder):
    import deepspeed

    found = {}
    for attached in (False, True):
        model = tiny.model("phi")
        config = {
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if attached:
            fastpo.attach(model)
        for one in batches(rank):
            output = engine(**one)
            assert (output.logits is None) == attached
            engine.backward(output.loss)
            engine.step()
        assert not any(p.numel() for p in model.parameters())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found[attached] = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_attached_model_under_zero_3(tmp_path):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(_processes.PROCESSES)}
    _processes.run(zero, tmp_path, seconds=400)
    found = torch.load(tmp_path / "0.pt")
    before = tiny.model("phi").lm_head.weight
    assert (found[True]["lm_head.weight"] - before).abs().max() > 1e-3
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)


CALLS = {
    "linear_logps": fastpo.linear_logps,
    "linear_topk": lambda hidden, weight, labels: fastpo.linear_topk(hidden, weight, 2),
    "linear_divergence": lambda hidden, weight, labels: fastpo.linear_divergence(
        *(hidden, weight) * 2, kind="forward_kl"
    ),
    "mixed_linear_logps": lambda hidden, weight, labels: fastpo.mixed_linear_logps(
        [hidden] * 2, [weight] * 2, [0.5, 0.5], labels
    ),
    "multi_head_logps": lambda hidden, weight, labels: fastpo.multi_head_logps(
        hidden, weight[None], labels, labels * 0
    ),
}


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize("call", CALLS)
def test_a_dtensor_is_refused_by_name(call, name, placement, mesh):
    given = {"hidden": torch.randn(5, 8), "weight": torch.randn(40, 8), "labels": torch.arange(5)}
    CALLS[call](**given)
    given[name] = distribute_tensor(given[name], mesh, [placement])
    with pytest.raises(ValueError, match=rf"{name}: expected a whole tensor, got DTensor \("):
        CALLS[call](**given)

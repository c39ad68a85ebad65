"""Lazy logits in two processes: DistributedDataParallel, FSDP1, FSDP2."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastpo
from fastpo.integrations.lazy import cell
from fastpo.integrations.lazy.logits import LazyLogits


def half(rank):
    return {name: x[2 * rank : 2 * rank + 2] for name, x in tiny.batch(rows=4).items()}


def loss(model, batch):
    """Of as many scored tokens in each process, so that means of means are means."""
    made = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = made[:, :5]
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:6, None])
    return -logps.mean() + 0.1 * logits.logsumexp(-1).square().mean(), isinstance(made, LazyLogits)


def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp1(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp1_flat(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model):
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"ddp": ddp, "fsdp1": fsdp1, "fsdp1_flat": fsdp1_flat, "fsdp2": fsdp2}


def trained(name, everywhere, rank):
    """Two losses around a step of SGD: the second one tells the gradients of the first."""
    model, batch = tiny.model("llama").train(), half(rank)
    if everywhere is not None:
        fastpo.patch(lazy=True) if everywhere else fastpo.lazy_logits(model)
    wrapped = WRAPPERS[name](model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        found, lazy_made = loss(wrapped, batch)
        assert lazy_made == (everywhere is not None and "fsdp1" not in name)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        mean = found.detach()
        dist.all_reduce(mean)
        losses.append(mean / dist.get_world_size())
    if everywhere is not None:
        fastpo.unpatch()
    return torch.stack(losses)


def gradient_of_the_head(lazy, rank):
    """Of a head that alone is trained: no gradient reaches the hidden states."""
    model = tiny.model("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    if lazy:
        fastpo.lazy_logits(model)
    found, _ = loss(fsdp2(model), half(rank))
    found.backward()
    return model.lm_head.weight.grad.full_tensor()


def assert_given_up(rank):
    """FSDP2 frees a head that was said to be resharded after the forward."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny.model("llama").train()
    fastpo.lazy_logits(model)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    logits = model(**half(rank)).logits
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: expected to be there"):
        logits.logsumexp(-1)


def work(rank, names):
    dist.init_process_group("gloo")
    for name in names:
        own = trained(name, None, rank)
        assert own[1] < own[0] - 0.01, "a step that changes nothing proves nothing"
        for everywhere in (False, True):
            torch.testing.assert_close(trained(name, everywhere, rank), own, rtol=1e-4, atol=1e-5)
    assert not cell.told, cell.told
    own, ours = (gradient_of_the_head(lazy, rank) for lazy in (False, True))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    assert_given_up(rank)


@pytest.mark.filterwarnings("ignore")
def test_losses_are_the_models():
    _processes.run(work, tuple(WRAPPERS))

"""Shared prompts in two processes whose batches have layouts of their own: DDP, FSDP2, ZeRO-3."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import _trainers
import torch
from test_trl_sharded import FSDP, WHOLE, ZERO, shard_on_a_cpu, whole

import fastpo
from fastpo.integrations.sharing import backbone

CHECKPOINTED = {**FSDP, "gradient_checkpointing": True}
# name: TRL's prefix, config on top where weights are whole and where they are in shards
TRAINERS = {"dpo": ("DPO", WHOLE, CHECKPOINTED), "cpo": ("CPO", WHOLE, FSDP)}


def train(prefix, folder, changes):
    settings = {"per_device_train_batch_size": 1, "max_steps": 2, "use_cpu": False, **changes}
    path = _trainers.saved(folder)
    trainer = _trainers.build(prefix, folder, path, tiny.preferences(), settings)
    logs, _ = _trainers.train(trainer)
    for name in ("total_flos", "logits/chosen", "logits/rejected", "fastpo/tokens_saved"):
        for log in logs:
            log.pop(name, None)
    return logs, {name: whole(p) for name, p in trainer.model.named_parameters()}


def process(rank, folder, sharded):
    """Padded; then packed, with whole weights and in shards; and how each batch was packed."""
    sizes, packed, runs, layouts = [], backbone.Packer.packed, {}, {}

    def noted(self, own, inputs, layout):
        sizes.append((layout.size, any(row.shared for row in layout.rows)))
        return packed(self, own, inputs, layout)

    def shared(name, kind, *arguments):
        sizes.clear()
        with fastpo.patched(shared_prompts=True):
            runs[name, kind] = train(*arguments)
        layouts[name, kind] = list(sizes)

    backbone._LEAST, backbone.is_worth, backbone.Packer.packed = 1, lambda *_: True, noted
    for name, (prefix, ddp, _) in TRAINERS.items():
        runs[name, "own"] = train(prefix, folder, ddp)
        shared(name, "ddp", prefix, folder, ddp)
    shard_on_a_cpu()
    for name, (prefix, _, fsdp) in TRAINERS.items():
        shared(name, "sharded", prefix, folder, sharded or fsdp)
    torch.save((runs, layouts), folder / f"{rank}.pt")


def trained(folder, sharded, seconds):
    _trainers.saved(folder)
    _processes.run(process, folder, sharded, seconds=seconds)
    return _processes.loaded(folder)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("shared"), None, 240)


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """Its first run on a machine compiles an operator of DeepSpeed's for minutes."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(_processes.PROCESSES)}
    return trained(tmp_path_factory.mktemp("zero"), ZERO, 400)


def assert_trained_the_same(name, kind, ranks):
    (first, layouts), (second, others) = ranks
    _trainers.assert_same(first[name, kind], first[name, "own"])
    torch.testing.assert_close(second[name, kind][1], first[name, kind][1], rtol=0, atol=0)
    sizes, other = layouts[name, kind], others[name, kind]
    assert len(sizes) == len(other) and sizes != other
    assert any(shared for _, shared in sizes)


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_train_the_same(name, kind, fsdp):
    assert_trained_the_same(name, kind, fsdp)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("name", TRAINERS)
def test_zero_3(name, zero):
    assert_trained_the_same(name, "sharded", zero)

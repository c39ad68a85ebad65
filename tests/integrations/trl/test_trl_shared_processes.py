"""Shared prompts in two processes whose batches have layouts of their own: DDP, and FSDP2."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _processes
import _tiny as tiny
import _trainers
import torch
from test_trl_sharded import FSDP, WHOLE, shard_on_a_cpu, whole

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


def process(rank, folder):
    """Padded; then packed, with whole weights and in shards."""
    sizes, packed = [], backbone.Packer.packed

    def noted(self, own, inputs, layout):
        sizes.append((layout.size, any(row.shared for row in layout.rows)))
        return packed(self, own, inputs, layout)

    backbone._LEAST, backbone.is_worth, backbone.Packer.packed = 1, lambda *_: True, noted
    runs = {}
    for name, (prefix, ddp, _) in TRAINERS.items():
        runs[name, "own"] = train(prefix, folder, ddp)
        with fastpo.patched(shared_prompts=True):
            runs[name, "ddp"] = train(prefix, folder, ddp)
    shard_on_a_cpu()
    for name, (prefix, _, fsdp) in TRAINERS.items():
        with fastpo.patched(shared_prompts=True):
            runs[name, "fsdp"] = train(prefix, folder, fsdp)
    torch.save((runs, sizes), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    _trainers.saved(folder)
    _processes.run(process, folder, seconds=240)
    return [torch.load(folder / f"{rank}.pt") for rank in range(_processes.PROCESSES)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_train_the_same(name, kind, ranks):
    (first, sizes), (second, others) = ranks
    _trainers.assert_same(first[name, kind], first[name, "own"])
    torch.testing.assert_close(second[name, kind][1], first[name, kind][1], rtol=0, atol=0)
    assert len(sizes) == len(others) and sizes != others
    assert any(shared for _, shared in sizes)

"""`fastpo.patch` under DistributedDataParallel: two processes train as they do without it."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _trainers
import torch
import torch.multiprocessing as mp

import fastpo

pytestmark = pytest.mark.xdist_group("two processes")
PROCESSES = 2
TRAINERS = ("DPO", "SFT")


def process(rank: int, port: int, folder: str) -> None:
    """What `torchrun` starts: each trainer without the patch, then with it."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(value) for name, value in local.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    runs = {}
    for prefix, patched in itertools.product(TRAINERS, (False, True)):
        with fastpo.patched() if patched else contextlib.nullcontext():
            trainer = _trainers.build(
                prefix,
                Path(folder),
                _trainers.saved(Path(folder)),
                _trainers.DATA[prefix](),
                {"per_device_train_batch_size": 1, "ddp_backend": "gloo"},
            )
            runs[prefix, patched] = _trainers.train(trainer)
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save(runs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_train_the_same(tmp_path):
    _trainers.saved(tmp_path)
    mp.spawn(process, args=(free_port(), str(tmp_path)), nprocs=PROCESSES)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for prefix in TRAINERS:
        # The main process alone writes its log to the end.
        _trainers.assert_same(ranks[0][prefix, True], ranks[0][prefix, False])
        # Had the gradients not been averaged, each process would hold a model of its own rows.
        first, second = (runs[prefix, True][1] for runs in ranks)
        assert all(torch.equal(first[name], second[name]) for name in first)

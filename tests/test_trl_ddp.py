"""`fastpo.patch` under DistributedDataParallel: two processes train as they do without it."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import torch.multiprocessing as mp

import fastpo

pytestmark = pytest.mark.xdist_group("two processes")
PROCESSES = 2


def process(rank: int, port: int, folder: str) -> None:
    """What `torchrun` starts: DPO without the patch, then with it."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(value) for name, value in local.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    runs = []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            trainer = _trainers.build(
                "DPO",
                Path(folder),
                f"{folder}/model",
                tiny.preferences(),
                {"per_device_train_batch_size": 1, "ddp_backend": "gloo"},
            )
            logs, parameters = _trainers.train(trainer)
        wrapped = type(trainer.model_wrapped).__name__
        runs.append({"logs": logs, "parameters": parameters, "wrapped": wrapped})
    torch.save(runs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_train_the_same(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "model")
    mp.spawn(process, args=(free_port(), str(tmp_path)), nprocs=PROCESSES)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for own, ours in results:
        assert own["wrapped"] == ours["wrapped"] == "DistributedDataParallel"
        torch.testing.assert_close(ours["parameters"], own["parameters"], rtol=1e-4, atol=1e-5)
    own, ours = results[0]
    assert len(ours["logs"]) == len(own["logs"]) == 4
    for log, own_log in zip(ours["logs"], own["logs"], strict=True):
        assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)
    # Had the gradients not been averaged, each process would hold a model of its own rows.
    first, second = (runs[1]["parameters"] for runs in results)
    assert all(torch.equal(first[name], second[name]) for name in first)

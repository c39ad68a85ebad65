"""Several processes on this machine as `torchrun` would start them, talking through gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

PROCESSES = 2

# Imported once, by a server that processes are forked from: what they import takes seconds.
SHARED = ("torch.distributed.fsdp", "torch.distributed.tensor", "transformers.trainer", "peft")
SHARED += ("trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.grpo_trainer")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(
    work: Callable[..., None],
    *arguments: Any,
    seconds: float = 120,
    processes: int = PROCESSES,
) -> None:
    """`work(rank, *arguments)` in each process; one that fails or waits for ever fails the test."""
    multiprocessing.set_forkserver_preload([*SHARED])
    # A GPU that an import has only counted is lost to a fork.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    given = free_port(), processes, dict(os.environ), work, arguments
    started = mp.start_processes(_process, given, processes, join=False, start_method=method)
    deadline = time.monotonic() + seconds
    while not started.join(timeout=1):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()
            pytest.fail(f"processes: expected to end in {seconds} s, got none that did")


def loaded(folder: Path) -> list[Any]:
    """What each process has saved there as "<rank>.pt", in the order of ranks."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _process(
    rank: int,
    port: int,
    processes: int,
    environment: dict[str, str],
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ |= environment
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in local.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in every test: see conftest.py
    work(rank, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

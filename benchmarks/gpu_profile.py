"""One pass of what the time of a head goes into, for a profiler that looks from start to stop.

ncu --profile-from-start off --clock-control none python benchmarks/gpu_profile.py
"""

from __future__ import annotations

import os
import sys

import torch

import fastpo
from fastpo.ops.rows import registry
from fastpo.testing import make_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, V, H: few enough tiles for a profiler that runs each launch dozens of times.
SHAPE = {"cuda": (8192, 32_768, 2048), "cpu": (16, 96, 16)}[DEVICE]
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}[DEVICE]
BACKENDS = ("anchored", "cutlass", "triton")


def step(backend: str, *, trained: bool) -> None:
    x = make_head(*SHAPE, dtype=DTYPE, device=DEVICE).like(DTYPE, grad=trained)
    stats = fastpo.linear_logps(x.hidden, x.weight, x.labels, budget=2**62, backend=backend)
    assert stats.logps is not None
    if trained:
        stats.logps.sum().backward()


def main() -> int:
    if DEVICE == "cpu":  # before the first import of triton: its decorator reads it
        os.environ.setdefault("TRITON_INTERPRET", "1")
    device = torch.device(DEVICE)
    there = [name for name in BACKENDS if registry.unavailable(name, device) is None]
    for backend in there:
        step(backend, trained=True)  # compiles
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for backend in there:
        step(backend, trained=False)
        step(backend, trained=True)
        print(f"{backend}: score, then keep", flush=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

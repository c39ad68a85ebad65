"""The machine a figure was measured on, its clock, and its memory."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from .errors import DeviceLost

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "liger_kernel",
    "cut_cross_entropy",
    "quack-kernels",
)
# An L3 of this size holds nothing that matters to a head of real size.
_CPU_CACHE = 64 * 2**20


def facts(device: str) -> dict[str, Any]:
    """Device, versions, date and load: what a figure means nothing without."""
    found: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "device_type": device,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        # Of a CPU shared with other work; 1 per core means nothing was left for this.
        "load_average": load_average(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: installed(name) for name in ("fastpo", *PACKAGES)}
        | {"torch": torch.__version__},  # says for which CUDA, as its metadata may not
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["cuda"] = torch.version.cuda
        found["compute_capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        found["gpu_memory_mib"] = properties.total_memory // 2**20
    return found


def load_average() -> list[float] | None:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def slug(device: str) -> str:
    """A file name's part: `nvidia_h200`, `cpu_amd_epyc`."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu {cpu_name()}"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


T = TypeVar("T")

# About 5 ms at 2 GHz; the host calls all that a head needs in 0.5 to 3.
_HEAD_START = 10_000_000
# Seconds after which what was called hangs: the longest call of a benchmark takes less than one.
_PATIENCE = 20.0


class Took(NamedTuple):
    """Milliseconds: the device's own on a GPU, and the host's until all was called."""

    ms: float
    host_ms: float


class Stopwatch(Protocol):
    def __call__(self, function: Callable[[], T]) -> tuple[Took, T]: ...


def stopwatch(device: str) -> Stopwatch:
    """Runs a function; gives what it took, and its result. DeviceLost if a GPU does not answer."""

    def on_cpu(function: Callable[[], T]) -> tuple[Took, T]:
        start = time.perf_counter()
        result = function()
        milliseconds = (time.perf_counter() - start) * 1e3
        return Took(milliseconds, milliseconds), result

    def on_gpu(function: Callable[[], T]) -> tuple[Took, T]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The host runs ahead meanwhile. On an idle device the time of its first calls would count
        # as the device's: 0.5 ms of a score, where a product of 4,096 tokens takes 1.5.
        torch.cuda._sleep(_HEAD_START)
        start.record()
        on_host, result = on_cpu(function)
        end.record()
        _wait(end)
        return Took(start.elapsed_time(end), on_host.ms), result

    return on_gpu if device == "cuda" else on_cpu


def _wait(end: torch.cuda.Event) -> None:
    """Asked again and again: who waits in the driver hears no interrupt, and waits for ever."""
    began = time.monotonic()
    while not end.query():
        if time.monotonic() - began > _PATIENCE:
            raise DeviceLost(f"hangs: no answer for {_PATIENCE:g} s")
        time.sleep(1e-4)


def cache_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return _CPU_CACHE


class Peak:
    """`Peak(device)` before, `.mib()` after: growth of the peak, tensors on a GPU, else resident.

    Resident memory of one run cannot be told from what an earlier one left in the allocator, so on
    a CPU each measurement has a process of its own.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
            self.before = _status("VmRSS")
        else:
            raise RuntimeError(f"memory on a CPU: expected Linux, got {sys.platform}")

    def mib(self) -> float:
        return (self.total_mib() * 2**20 - self.before) / 2**20

    def total_mib(self) -> float:
        peak = torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")
        return peak / 2**20


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")
    return int(found.group(1)) * 1024

"""The largest context or batch whose whole step stays under a memory limit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import machine
from ..process import alone, for_memory, fresh
from ..report import progress
from . import loop
from .architectures import Models
from .loop import Job

# What a search begins with: tokens of a row, or pairs. It ends at a sixteenth of what fits.
UNITS = {"length": 32, "pairs": 1}
_SHARE = 16


def search(job: Job, of: str, limit_mib: int | None, most: int) -> dict[str, Any]:
    """of: "length" or "pairs"; at_limit: `most` was reached, and more may fit."""
    if job.device == "cuda":
        if limit_mib is None:
            limit_mib = int(machine.facts(job.device)["gpu_memory_mib"])
        units, tries = alone(partial(_search_on_gpu, of=of, limit_mib=limit_mib, most=most), job)
    else:
        assert limit_mib is not None
        units, tries = largest(lambda n: _fits_alone(job, of, n, limit_mib), most // UNITS[of])
    found = {"of": of, "variant": job.variant, "limit_mib": limit_mib, "tries": tries}
    other = "pairs" if of == "length" else "length"
    top = most // UNITS[of]
    found |= {other: getattr(job, other), "largest": units * UNITS[of], "at_limit": units >= top}
    return found


def largest(fits: Callable[[int], bool], most: int) -> tuple[int, int]:
    """The largest n <= most that fits, 0 if not even 1 does, and the number of tries.

    Doubles until one does not fit, then halves the gap; exact below 16, to a sixteenth above.
    """
    low, high, tries = 0, most + 1, 0
    while high - low > max(1, low // _SHARE):
        n = min(max(2 * low, 1), most) if high > most else (low + high) // 2
        tries += 1
        if fits(n):
            low = n
        else:
            high = n
        if low >= most:
            break
    return low, tries


def _sized(job: Job, of: str, units: int) -> tuple[int, int]:
    size = units * UNITS[of]
    return (job.pairs, size) if of == "length" else (size, job.length)


def _fits_alone(job: Job, of: str, units: int, limit_mib: int) -> bool:
    """On a CPU: one step in a process of its own, judged by the peak of its resident memory."""
    pairs, length = _sized(job, of, units)
    tried = replace(job, pairs=pairs, length=length)
    progress(f"{tried}: under {limit_mib:,} MiB?")
    try:
        return fresh(total_mib, tried) <= limit_mib
    except RuntimeError as error:
        if not for_memory(error):
            raise
        return False


def total_mib(job: Job) -> float:
    torch.set_num_threads(job.threads)
    models = loop.models_of(job)
    with loop.bare_loop(job, models) as step:
        peak = machine.Peak(job.device)
        step(job.pairs, job.length)
    return peak.total_mib()


def _search_on_gpu(job: Job, of: str, limit_mib: int, most: int) -> tuple[int, int]:
    """One model for all tries; what does not fit is what torch's allocator refuses."""
    with _allocator_limited_to(limit_mib):
        return _search_with(loop.models_of(job), job, of, most)


@contextmanager
def _allocator_limited_to(limit_mib: int) -> Iterator[None]:
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + limit_mib * 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _search_with(models: Models, job: Job, of: str, most: int) -> tuple[int, int]:
    with loop.bare_loop(job, models) as step:

        def fits(units: int) -> bool:
            try:
                step(*_sized(job, of, units))
            except torch.OutOfMemoryError:
                models.policy.zero_grad(set_to_none=True)
                return False
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            return True

        if not fits(1):  # it also makes the optimiser's state, which every later try needs
            return 0, 1
        return largest(fits, most // UNITS[of])

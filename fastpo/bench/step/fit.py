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


def search(job: Job, of: str, limit_mib: int | None, most: int, found: dict[str, Any]) -> None:
    """Into `found`, after every try: an interrupted search leaves what fits so far.

    of: "length" or "pairs"; at_limit: `most` was reached, or the search interrupted; more may fit.
    """
    if limit_mib is None:
        limit_mib = int(machine.facts(job.device)["gpu_memory_mib"])
    other = "pairs" if of == "length" else "length"
    found |= {"of": of, "variant": job.variant, "limit_mib": limit_mib, "tries": 0}
    found |= {other: getattr(job, other), "largest": 0, "at_limit": True}
    top = most // UNITS[of]

    def tried(units: int) -> None:
        found["tries"] += 1
        found["largest"] = units * UNITS[of]

    if job.device == "cuda":
        do = partial(_search_on_gpu, of=of, limit_mib=limit_mib, top=top, tried=tried)
        units = alone(do, job)
    else:
        units = largest(lambda n: _fits_alone(job, of, n, limit_mib), top, tried)
    found["at_limit"] = units >= top


def largest(fits: Callable[[int], bool], most: int, tried: Callable[[int], None]) -> int:
    """The largest n <= most that fits, 0 if not even 1 does; `tried` hears it after each try.

    Doubles until one does not fit, then halves the gap; exact below 16, to a sixteenth above.
    """
    low, high = 0, most + 1
    while high - low > max(1, low // _SHARE):
        n = min(max(2 * low, 1), most) if high > most else (low + high) // 2
        if fits(n):
            low = n
        else:
            high = n
        tried(low)
        if low >= most:
            break
    return low


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


def _search_on_gpu(
    job: Job, of: str, limit_mib: int, top: int, tried: Callable[[int], None]
) -> int:
    """One model for all tries; what does not fit is what torch's allocator refuses."""
    with _allocator_limited_to(limit_mib):
        return _search_with(loop.models_of(job), job, of, top, tried)


@contextmanager
def _allocator_limited_to(limit_mib: int) -> Iterator[None]:
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + limit_mib * 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _search_with(models: Models, job: Job, of: str, top: int, tried: Callable[[int], None]) -> int:
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
            tried(0)
            return 0
        return largest(fits, top, tried)

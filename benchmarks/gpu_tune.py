"""Which blocks the anchored product should have: compiled by many processes, timed by one in turns.

Every candidate stands in for `kernels/_blocks.py`, or for the schedule of
`fastpo/ops/rows/anchored_cutlass.py`, while it runs, and is judged against float64 before it is
timed. The JSON is written after each head, and when it is interrupted.

    python benchmarks/gpu_tune.py --out tune.json
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo.bench import machine, report
from fastpo.bench.check import judge
from fastpo.bench.errors import DeviceLost
from fastpo.bench.process import LOST, leave, one_interrupt
from fastpo.bench.variants import Result
from fastpo.ops.rows import anchored_cutlass, registry
from fastpo.testing import HeadInputs, make_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}[DEVICE]
GROUPS, HALVINGS = {"cuda": ((8, 16, 24), (2, 3, 4)), "cpu": ((8, 16), (2,))}[DEVICE]
# N, V, H; and sizes for which the same kernels are compiled.
HEADS = {
    "cuda": ((8192, 128_256, 4096), (8192, 151_936, 896), (8192, 128_256, 2048)),
    "cpu": ((16, 96, 16),),
}[DEVICE]
SMALL = {"cuda": (256, 8192), "cpu": (16, 48)}[DEVICE]
JUDGED = 64  # tokens
PATIENCE = 30  # seconds in which all candidates are compiled
MODES = ("score", "keep")

# name, backend, what is another in GemmBlocks, or in the schedule of "cutlass"
Candidate = tuple[str, str, dict[str, Any]]


def candidates() -> list[Candidate]:
    found: list[Candidate] = [("as shipped", "anchored", {})]
    for group, halvings in itertools.product(GROUPS, HALVINGS):
        changes = {"group": group, "halvings": halvings}
        found.append((f"group {group}, halvings {halvings}", "anchored", changes))
    for pingpong, swizzle, words_first in itertools.product((True, False), (1, 8), (False, True)):
        name = f"{'ping-pong' if pingpong else 'cooperative'}, swizzle {swizzle}"
        name += f", {'words' if words_first else 'rows'} first"
        changes = {"pingpong": pingpong, "swizzle": swizzle, "words_first": words_first}
        found.append((name, "cutlass", changes))
    return [each for each in found if registry.unavailable(each[1], torch.device(DEVICE)) is None]


@contextmanager
def standing_in(backend: str, changes: dict[str, Any]) -> Iterator[None]:
    from fastpo.kernels import _blocks

    module, name = _blocks, "gemm_blocks"
    if backend == "cutlass":
        module, name = anchored_cutlass, "schedule"
    original = getattr(module, name)
    setattr(module, name, lambda *given: original(*given)._replace(**changes))
    try:
        yield
    finally:
        setattr(module, name, original)


def forward(x: HeadInputs, candidate: Candidate, mode: str) -> Tensor:
    """Log-probabilities; in `keep` the exponentials are stored, too."""
    _, backend, changes = candidate
    x.hidden.requires_grad_(mode == "keep")
    x.weight.requires_grad_(mode == "keep")
    with standing_in(backend, changes):
        stats = fastpo.linear_logps(x.hidden, x.weight, x.labels, budget=2**62, backend=backend)
    assert stats.logps is not None
    return stats.logps.detach()


def compile_one(work: tuple[Candidate, int]) -> str | None:
    """Into Triton's cache; why it cannot be, where it cannot."""
    candidate, hidden = work
    try:
        for mode in MODES:
            forward(make_head(*SMALL, hidden, dtype=DTYPE, device=DEVICE), candidate, mode)
    except Exception as error:  # of Triton's compiler, as a rule
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return None


def compiled(processes: int) -> list[Candidate]:
    """The candidates that the device can have; all heads take the same kernels."""
    work = [(candidate, HEADS[0][2]) for candidate in candidates()]
    if processes == 1:
        answers = list(map(compile_one, work))
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            deadline = time.monotonic() + PATIENCE
            asked = [pool.apply_async(compile_one, (one,)) for one in work]
            answers = [answer(each, deadline - time.monotonic()) for each in asked]
    refused = {each[0]: why for (each, _), why in zip(work, answers, strict=True) if why}
    for name, why in refused.items():
        print(f"{name}: {why}", flush=True)
    return [each for each in candidates() if each[0] not in refused]


def answer(asked: Any, seconds: float) -> str | None:
    """A candidate that hangs costs only itself; its process ends with the pool."""
    try:
        why: str | None = asked.get(max(seconds, 0))
    except multiprocessing.TimeoutError:
        return f"not compiled and run once within {PATIENCE} s"
    return why


def complaints(x: HeadInputs, found: list[Candidate]) -> Iterator[str | None]:
    few = HeadInputs(x.hidden.detach()[:JUDGED], x.weight.detach(), x.labels[:JUDGED])
    judged = judge(few, torch.ones(len(few.labels), device=DEVICE))
    watch = machine.stopwatch(DEVICE)
    for candidate in found:
        _, logps = watch(partial(forward, few, candidate, "score"))
        result = Result(logps, {})
        yield judged.complaint(judged.errors(result), DTYPE)


def one_head(shape: tuple[int, int, int], found: list[Candidate], repeats: int) -> Iterator[Any]:
    """A row for each candidate and mode; interrupted, or stopped by one that hangs, of the turns
    that were done."""
    x = make_head(*shape, dtype=DTYPE, device=DEVICE)
    watch, right = machine.stopwatch(DEVICE), []
    for candidate, why in zip(found, complaints(x, found), strict=True):
        if why is None:
            right.append(candidate)
        else:
            yield {"shape": shape, "variant": candidate[0], "status": "wrong", "reason": why}
    runs: dict[tuple[str, str], list[float]] = {}
    interrupted: BaseException | None = None
    try:
        for turn in range(repeats + 1):  # the first warms up
            for candidate, mode in itertools.product(right, MODES):
                took, _ = watch(partial(forward, x, candidate, mode))
                runs.setdefault((candidate[0], mode), []).extend([took.ms] * bool(turn))
    except (KeyboardInterrupt, DeviceLost) as error:
        interrupted = error
    for (name, mode), times in runs.items():
        if times:
            row = {"shape": shape, "variant": name, "mode": mode, "status": "ok"}
            yield row | {"median_ms": statistics.median(times), "runs_ms": times}
    if interrupted is not None:
        raise interrupted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns; default: 7")
    parser.add_argument("--processes", type=int, default=12, metavar="N", help="that compile")
    options = parser.parse_args()
    one_interrupt()
    if DEVICE == "cpu":  # before the first import of triton: its decorator reads it
        os.environ.setdefault("TRITON_INTERPRET", "1")
    made: dict[str, Any] = machine.facts(DEVICE) | {"what": "tune", "rows": []}
    found = compiled(options.processes)
    try:
        for shape in HEADS:
            for row in one_head(shape, found, options.repeats):
                made["rows"].append(row)
                said = row.get("reason") or f"{row['mode']:<6}{row['median_ms']:>9.3f} ms"
                print(f"{row['shape']} {row['variant']:<36}{said}", flush=True)
                if options.out is not None:
                    report.write(made, options.out)
    except DeviceLost as lost:
        print(f"the device was lost: {lost}", file=sys.stderr)
        return LOST
    return int(any(row["status"] == "wrong" for row in made["rows"]))


if __name__ == "__main__":
    leave(main())

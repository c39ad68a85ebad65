"""`fastpo bench head`: every head that is there, checked, then timed in turns.

Unit: one bare product of 2·N·H·V FLOPs over the tiles `linear_logps` uses, measured in the same run
(in float32 on a CPU, whose 16-bit products are slower). The floor of a case is its bare products.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastpo.ops.rows import fastest
from fastpo.testing import HeadInputs, make_head

from . import machine
from .check import judge
from .errors import BenchError, DeviceLost
from .machine import Took
from .process import Died, for_memory, fresh
from .report import head_table, progress
from .rivals import rival_variants
from .shapes import Shape
from .variants import (
    CASES,
    Case,
    Forward,
    Variant,
    bare_products,
    own_variants,
    plain_variants,
    run,
)

Row = dict[str, Any]
Floors = dict[Case, list[float]]  # milliseconds of the bare products, of each turn
Say = Callable[[str], None]


@dataclass(frozen=True)
class HeadOptions:
    """cases, variants: None: all; variants are matched by how their names begin.

    slow: seconds after which a variant's first run is its only one.
    time_limit: seconds after which no further shape is begun.
    """

    shapes: tuple[Shape, ...]
    device: str = "cpu"
    dtype: str = "float32"
    cases: tuple[Case, ...] = tuple(CASES)
    variants: tuple[str, ...] | None = None
    repeats: int = 3
    memory: bool = True
    check_only: bool = False
    slow: float = 20.0
    time_limit: float | None = None


@dataclass
class Entry:
    """A variant on its way through one shape: refused, wrong, or timed."""

    variant: Variant
    row: Row
    forward: Forward | None = None
    runs: list[Took] = field(default_factory=list)
    single: bool = False

    @property
    def key(self) -> tuple[str, Case]:
        return self.variant.name, self.variant.case


@dataclass(frozen=True)
class Problem:
    """One shape: equal inputs more than a cache holds, so that no turn finds its own there."""

    shape: Shape
    sets: list[HeadInputs]
    upstream: Tensor  # [N] d loss / d logp

    @property
    def device(self) -> str:
        return self.sets[0].hidden.device.type


@lru_cache(maxsize=1)
def _longest(shape: Shape, dtype: torch.dtype, device: str) -> HeadInputs:
    return make_head(shape.tokens, shape.vocab, shape.hidden, dtype=dtype, device=device)


def make_problem(
    shape: Shape, device: str, dtype: torch.dtype, *, copies: bool, longest: int | None = None
) -> Problem:
    """longest: tokens of the longest shape of this head, so that its weight is drawn once."""
    drawn = _longest(shape._replace(tokens=longest or shape.tokens), dtype, device)
    n = shape.tokens
    x = HeadInputs(drawn.hidden.detach()[:n], drawn.weight.detach(), drawn.labels[:n])
    own = x.hidden.nbytes + x.weight.nbytes
    # Tokens of one sequence share a coefficient; chosen ones rise, rejected ones fall.
    g = torch.linspace(0.05, 0.15, shape.tokens, device=device)
    g[shape.tokens // 2 :] *= -1
    enough = -(-2 * machine.cache_bytes(device) // own) if copies and device == "cuda" else 1
    return Problem(shape, [x, *(x.like(dtype) for _ in range(min(enough, 64) - 1))], g)


def all_variants(options: HeadOptions) -> list[Variant]:
    everything = own_variants(torch.device(options.device)) + plain_variants() + rival_variants()
    return [
        variant
        for variant in everything
        if variant.case in options.cases
        and (options.variants is None or variant.name.startswith(options.variants))
    ]


def _check_variants(options: HeadOptions) -> None:
    """BenchError for the beginning of a name that none has in these cases."""
    everything = dict.fromkeys(v.name for v in all_variants(replace(options, variants=None)))
    for start in options.variants or ():
        if not any(name.startswith(start) for name in everything):
            names = ", ".join(everything)
            raise BenchError(
                f"--variants: expected names, or their beginnings, of {names}, got {start!r}"
            )


def bench(options: HeadOptions, say: Say, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report; handed to `keep` after each shape, and in the middle of one that is interrupted.

    BenchError for variants that are not there; DeviceLost when one leaves a GPU on which nothing
    runs any more.
    """
    _check_variants(options)
    began = time.monotonic()
    report = machine.facts(options.device) | {"what": "head", "dtype": options.dtype}
    report |= {"repeats": options.repeats, "shapes": [], "rows": [], "left_out": []}
    head = getattr(torch, options.dtype), options.shapes[0].hidden
    report["backend"] = fastest.choose(None, torch.device(options.device), *head)
    for shape in options.shapes:
        if options.time_limit is not None and time.monotonic() - began > options.time_limit:
            report["left_out"].append({"shape": shape._asdict(), "reason": "time limit"})
            say(f"{shape}: left out, the time limit is reached")
            continue
        try:
            _one_shape(shape, options, report, say)
        except RuntimeError as error:  # of the inputs or of the judge, not of a variant
            if not for_memory(error):
                raise
            report["left_out"].append({"shape": shape._asdict(), "reason": "out of memory"})
            say(f"{shape}: left out, out of memory")
        finally:
            report["seconds"] = round(time.monotonic() - began, 1)
            keep(report)
    return report


def _one_shape(shape: Shape, options: HeadOptions, report: dict[str, Any], say: Say) -> None:
    dtype = getattr(torch, options.dtype)
    longest = max(s.tokens for s in options.shapes if s[1:] == shape[1:])
    copies = not options.check_only
    problem = make_problem(shape, options.device, dtype, copies=copies, longest=longest)
    entries = [Entry(v, _new_row(v, shape)) for v in all_variants(options)]
    floors: Floors = {case: [] for case in CASES}
    try:
        _check(entries, problem, options)
        if not options.check_only:
            _interleave(entries, floors, problem, options)
            if options.memory:
                _measure_memory(entries, problem, options)
    finally:
        _write_down(shape, entries, floors, report, say)
    del problem
    _release(options.device)


def _write_down(
    shape: Shape, entries: list[Entry], floors: Floors, report: dict[str, Any], say: Say
) -> None:
    """What there is, also of a shape that was interrupted."""
    if all(floors.values()):
        products = {case: statistics.median(runs) for case, runs in floors.items()}
        report["shapes"].append({**shape._asdict(), "floor_ms": products, "floor_runs": floors})
        for entry in entries:
            if entry.runs:
                entry.row.update(_figures(entry, products))
    for row in (entry.row for entry in entries):
        if row["status"] == "ok" and "errors" not in row:
            row |= {"status": "left out", "reason": "interrupted"}
    rows = [entry.row for entry in entries]
    report["rows"] += rows
    progress("")
    say(head_table(report, shape, rows))


def _new_row(variant: Variant, shape: Shape) -> Row:
    names = {"variant": variant.name, "case": variant.case, "own": variant.own}
    return {**names, **shape._asdict(), "status": "ok"}


def _check(entries: list[Entry], problem: Problem, options: HeadOptions) -> None:
    """Runs every variant once on the inputs it will be timed on."""
    x, watch = problem.sets[0], machine.stopwatch(problem.device)
    judged = judge(x, problem.upstream)
    for entry in entries:
        progress(f"checking {entry.variant.name}, {entry.variant.case}")
        try:
            entry.forward = entry.variant.make()
            call = partial(run, entry.variant, entry.forward, x, problem.upstream)
            took, result = watch(call)
            errors = judged.errors(result)
            del result
        except Exception as error:
            # Foreign code as a rule; whatever it raises is its refusal, and is shown.
            _refuse(entry, error, problem.device)
        else:
            entry.row["errors"] = errors
            complaint = judged.complaint(errors, x.hidden.dtype) if entry.variant.own else None
            if complaint is not None:
                entry.row |= {"status": "wrong", "reason": complaint}
                entry.forward = None
            if took.ms > options.slow * 1e3 and not entry.variant.compiles:
                entry.single, entry.runs = True, [took] if entry.forward else []


def _refuse(entry: Entry, error: Exception, device: str) -> None:
    line = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    said = f"{type(error).__name__}: {line.strip()[:160]}"
    reason = "out of memory" if for_memory(error) else said
    entry.row |= {"status": "refused", "reason": reason}
    entry.forward, entry.runs = None, []
    try:
        if isinstance(error, DeviceLost):
            raise error  # who asks again waits for ever
        _release(device)
    except RuntimeError as lost:
        # An illegal access, for one: each later call meets the same error.
        entry.row["lost"] = True
        raise DeviceLost(f"{entry.variant.name}, {entry.variant.case}: {reason}") from lost


def _release(device: str) -> None:
    """After an error: its traceback holds every tensor of the call, in a cycle."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _interleave(
    entries: list[Entry], floors: Floors, problem: Problem, options: HeadOptions
) -> None:
    """Every variant and the floors in turns; the first turn warms up. Fills the floors' runs."""
    watch = machine.stopwatch(problem.device)
    bare = problem.sets
    if problem.device == "cpu":
        bare = [x.like(torch.float32, grad=False) for x in bare]
    waiting = [entry for entry in entries if entry.forward is not None and not entry.single]
    for turn in range(options.repeats + 1):
        x = problem.sets[turn % len(bare)]
        progress(f"{problem.shape}: turn {turn} of {options.repeats}")
        for case, runs in floors.items():
            took, _ = watch(partial(bare_products, bare[turn % len(bare)], case))
            runs += [took.ms] * bool(turn)
        # Each turn begins elsewhere: the one after a long variant would always meet a warm machine.
        first = turn * 7 % max(len(waiting), 1)
        for entry in waiting[first:] + waiting[:first]:
            if entry.forward is None:
                continue
            try:
                took, _ = watch(partial(run, entry.variant, entry.forward, x, problem.upstream))
            except Exception as error:  # as in the check
                _refuse(entry, error, problem.device)
            else:
                entry.runs += [took] * bool(turn)


def _figures(entry: Entry, products: dict[Case, float]) -> Row:
    runs = [took.ms for took in entry.runs]
    median = statistics.median(runs)
    return {
        "median_ms": median,
        "host_ms": statistics.median(took.host_ms for took in entry.runs),
        "min_ms": min(runs),
        "max_ms": max(runs),
        "runs_ms": runs,
        "products": median / products["score"],
        "fraction_of_floor": products[entry.variant.case] / median,
    }


def _measure_memory(entries: list[Entry], problem: Problem, options: HeadOptions) -> None:
    for entry in entries:
        if entry.forward is None:
            continue
        progress(f"memory of {entry.variant.name}, {entry.variant.case}")
        try:
            if problem.device == "cuda":
                extra = _extra_mib(entry.variant, entry.forward, problem)
            else:
                extra = fresh(extra_mib_alone, *entry.key, problem.shape, options.dtype)
        except (Died, RuntimeError) as error:
            entry.row["memory_reason"] = str(error).splitlines()[0][:160]
        else:
            entry.row["extra_mib"] = extra


def _extra_mib(variant: Variant, forward: Forward, problem: Problem) -> float:
    """Peak above inputs, gradients and per-token outputs, which every variant owes."""
    x = problem.sets[0]
    owed = 4 * len(x.labels)
    owed += x.hidden.nbytes * (variant.case != "score")
    owed += x.weight.nbytes * (variant.case == "trainable")
    peak = machine.Peak(problem.device)
    run(variant, forward, x, problem.upstream)
    return peak.mib() - owed / 2**20


def extra_mib_alone(name: str, case: Case, shape: Shape, dtype: str) -> float:
    """The same in a fresh process on a CPU."""
    options = HeadOptions((shape,), dtype=dtype, cases=(case,), variants=(name,))
    variant = next(v for v in all_variants(options) if v.name == name)
    kind = getattr(torch, dtype)
    forward = variant.make()
    warm = make_problem(Shape(64, 512, shape.hidden), "cpu", kind, copies=False)
    run(variant, forward, warm.sets[0], warm.upstream)
    problem = make_problem(shape, "cpu", kind, copies=False)
    if variant.compiles:
        run(variant, forward, problem.sets[0], problem.upstream)
        gc.collect()
    return _extra_mib(variant, forward, problem)

"""`fastpo bench step`: whole DPO steps, with and without fastpo, and what fits into memory.

A step is the reference's pass, the policy's, the backward and the optimiser. On a CPU every
measurement has a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import machine, step_loop, step_model
from .errors import BenchError
from .process import Died, alone
from .step_fit import UNITS, search
from .step_loop import Job

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class StepOptions:
    """lengths: tokens of a row, half of them scored. fit: what to search the largest of.

    memory_limit: MiB; of tensors on a GPU, resident on a CPU.
    """

    model: str
    lengths: tuple[int, ...]
    device: str = "cpu"
    dtype: str = "float32"
    pairs: int = 4
    steps: int = 3
    rounds: int = 2
    variants: tuple[str, ...] = step_loop.VARIANTS
    checkpointing: bool = False
    fit: tuple[str, ...] = ()
    memory_limit: int | None = None
    most: int = 2**20
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.model not in step_model.MODELS:
            names = ", ".join(step_model.MODELS)
            raise BenchError(f"--model: expected one of {names}, got {self.model!r}")
        unknown = set(self.variants) - set(step_loop.VARIANTS)
        if unknown:
            names = ", ".join(step_loop.VARIANTS)
            raise BenchError(f"--variants: expected some of {names}, got {min(unknown)!r}")
        if set(self.fit) - set(UNITS):
            raise BenchError(f"--fit: expected some of {', '.join(UNITS)}, got {self.fit}")
        if self.fit and self.memory_limit is None and self.device == "cpu":
            raise BenchError("--fit: expected --memory-limit MIB with it on a CPU")

    def job(self, variant: str, *, pairs: int, length: int) -> Job:
        return Job(
            variant,
            self.model,
            self.device,
            self.dtype,
            pairs,
            length,
            self.steps,
            self.checkpointing,
            torch.get_num_threads(),
        )


def bench(options: StepOptions, say: Say, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report; handed to `keep` after each measurement."""
    from .report import step_table

    began = time.monotonic()
    report = machine.facts(options.device) | {"what": "step", "dtype": options.dtype}
    about = {"name": options.model, "parameters": _parameters(options.model)}
    report |= {"model": about, "rows": [], "fits": [], "left_out": []}
    report |= {"steps": options.steps, "checkpointing": options.checkpointing}
    for length in options.lengths:
        jobs = [options.job(name, pairs=options.pairs, length=length) for name in options.variants]
        rows = [_new_row(job) for job in jobs]
        report["rows"] += rows
        for turn in range(options.rounds):
            for job, row in zip(jobs, rows, strict=True):
                if _late(options, began):
                    row.setdefault("status", "left out")
                    row.setdefault("reason", "time limit")
                elif not turn or row["status"] == "ok":
                    _measure_into(row, job)
                keep(report)
    for of in options.fit:
        for variant in (v for v in options.variants if v in step_loop.BARE):
            if _late(options, began):
                report["left_out"].append({"variant": variant, "fit": of})
                continue
            job = options.job(variant, pairs=options.pairs, length=options.lengths[0])
            report["fits"].append(search(job, of, options.memory_limit, options.most))
            keep(report)
    report["seconds"] = round(time.monotonic() - began, 1)
    keep(report)
    say(step_table(report))
    return report


def _late(options: StepOptions, began: float) -> bool:
    return options.time_limit is not None and time.monotonic() - began > options.time_limit


def _parameters(name: str) -> int:
    with torch.device("meta"):
        config = step_model.architecture(name).config
        return step_model.AutoModelForCausalLM.from_config(config).num_parameters()


def _new_row(job: Job) -> Row:
    return {"variant": job.variant, "pairs": job.pairs, "length": job.length}


def _measure_into(row: Row, job: Job) -> None:
    """Adds a turn to the row; memory and losses are those of the first."""
    absent = step_loop.missing(job)
    if absent is not None:
        row.update(status="refused", reason=f"needs {absent}, which is not installed")
        return
    try:
        found = alone(measure, job)
    except (Died, RuntimeError) as error:  # whatever `measure` raised comes as RuntimeError
        line = next((part for part in str(error).splitlines() if part.strip()), "no reason given")
        row["status"] = "wrong" if line.startswith("AssertionError") else "refused"
        row["reason"] = "out of memory" if "OutOfMemory" in line else line[:200]
        return
    runs = row.get("runs_s", []) + found["runs_s"]
    median = statistics.median(runs)
    tokens = 2 * job.pairs * job.length
    row.update({**found, **row, "status": "ok", "runs_s": runs})
    row.update({"median_s": median, "min_s": min(runs), "tokens_per_s": tokens / median})


def measure(job: Job) -> Row:
    """Seconds of the steps after the first, memory over the loaded models, losses."""
    torch.set_num_threads(job.threads)
    losses, seconds, peak = (_bare if job.variant in step_loop.BARE else _through_trl)(job)
    return {
        "first_s": seconds[0],
        "runs_s": seconds[1:],
        "extra_mib": peak.mib(),
        "total_mib": peak.total_mib(),
        "loss": losses[-1],
        "losses": losses,
    }


Measured = tuple[list[float], list[float], machine.Peak]  # losses, seconds, memory


def _bare(job: Job) -> Measured:
    models = step_loop.models_of(job)
    step_loop.check(job, models)
    losses, seconds = [], []
    with step_loop.bare_loop(job, models) as step:
        peak = machine.Peak(job.device)
        for _ in range(job.steps + 1):
            start = step_loop.now(job.device)
            losses.append(step(job.pairs, job.length))
            seconds.append(step_loop.now(job.device) - start)
    return losses, seconds, peak


def _through_trl(job: Job) -> Measured:
    seconds: list[float] = []
    peaks: list[machine.Peak] = []
    losses = step_loop.trl_losses(job, seconds, lambda: peaks.append(machine.Peak(job.device)))
    return losses, seconds, peaks[0]

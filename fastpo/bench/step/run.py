"""`fastpo bench step`: whole DPO steps, with and without fastpo, and what fits into memory.

A step is the reference's pass, the policy's, the backward and the optimiser. On a CPU every
measurement has a process of its own.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...layout.tree import layout_of
from .. import machine
from ..errors import BenchError
from ..process import Died, alone, for_memory
from ..report import progress, step_table
from . import architectures, loop
from .batches import Texts, batch
from .fit import UNITS, search
from .loop import Job, Step

_WORDS = 32_768  # of a vocabulary: how many of a batch are one does not depend on it
_TIMES = ("first_s", "runs_s", "median_s", "min_s", "tokens_per_s")

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class StepOptions:
    """lengths: tokens of a row. texts: what the rows are. fit: what to search the largest of.

    memory_limit: MiB; of tensors on a GPU, resident on a CPU. clock: "wall", or "process" for a
    CPU that others use.
    """

    model: str
    lengths: tuple[int, ...]
    device: str = "cpu"
    dtype: str = "float32"
    pairs: int = 4
    steps: int = 3
    rounds: int = 2
    variants: tuple[str, ...] = loop.VARIANTS
    texts: tuple[Texts, ...] = (Texts(),)
    shared: bool = False
    clock: str = "wall"
    checkpointing: bool = False
    fit: tuple[str, ...] = ()
    memory_limit: int | None = None
    most: int = 2**20
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.model not in architectures.NAMES:
            names = ", ".join(architectures.NAMES)
            raise BenchError(f"--model: expected one of {names}, got {self.model!r}")
        unknown = set(self.variants) - set(loop.SHARING)
        if unknown:
            names = ", ".join(loop.SHARING)
            raise BenchError(f"--variants: expected some of {names}, got {min(unknown)!r}")
        if max(self.lengths) > architectures.POSITIONS:
            longest = f"integers <= {architectures.POSITIONS}"
            raise BenchError(f"--lengths: expected {longest}, got {max(self.lengths)}")
        if set(self.fit) - set(UNITS):
            raise BenchError(f"--fit: expected some of {', '.join(UNITS)}, got {self.fit}")
        if self.fit and self.memory_limit is None and self.device == "cpu":
            raise BenchError("--fit: expected --memory-limit MIB with it on a CPU")
        largest = max(texts.group for texts in self.texts)
        if largest > 2 * self.pairs:
            raise BenchError(f"--pairs: expected {largest // 2} for {largest} rows of one prompt")
        if self.clock == "process" and self.device != "cpu":
            raise BenchError("--cpu-time: expected --device cpu")

    def job(self, variant: str, texts: Texts, length: int) -> Job:
        return Job(
            variant,
            self.model,
            self.device,
            self.dtype,
            self.pairs,
            length,
            self.steps,
            self.checkpointing,
            torch.get_num_threads(),
            texts,
            self.clock,
        )


def bench(options: StepOptions, say: Say, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report; handed to `keep` after each measurement."""
    began = time.monotonic()
    report = machine.facts(options.device) | {"what": "shared" if options.shared else "step"}
    about = {"name": options.model, "parameters": _parameters(options.model)}
    report |= {"model": about, "dtype": options.dtype, "clock": options.clock}
    report |= {"steps": options.steps, "checkpointing": options.checkpointing}
    report |= {"rows": [], "fits": [], "left_out": []}
    for texts, length in itertools.product(options.texts, options.lengths):
        jobs = [options.job(name, texts, length) for name in options.variants]
        rows = [_new_row(job) for job in jobs]
        report["rows"] += rows
        for turn in range(options.rounds):
            turns = list(zip(jobs, rows, strict=True))
            for job, row in reversed(turns) if turn % 2 else turns:
                if _late(options, began):
                    row.setdefault("status", "left out")
                    row.setdefault("reason", "time limit")
                elif not turn or row["status"] == "ok":
                    progress(f"{job}: turn {turn + 1} of {options.rounds}")
                    _measure_into(row, job)
                    if not turn and row["status"] == "ok":
                        _compare(row, rows, job)
                keep(report)
    for of in options.fit:
        for variant in (v for v in options.variants if v in loop.BARE):
            if _late(options, began):
                report["left_out"].append({"variant": variant, "fit": of})
                continue
            job = options.job(variant, options.texts[0], options.lengths[0])
            found = {"texts": str(job.texts)} if options.shared else {}
            try:
                search(job, of, options.memory_limit, options.most, found)
            finally:  # interrupted, too
                report["fits"].append(found)
                keep(report)
    progress("")
    report["seconds"] = round(time.monotonic() - began, 1)
    keep(report)
    say(step_table(report))
    return report


def _late(options: StepOptions, began: float) -> bool:
    return options.time_limit is not None and time.monotonic() - began > options.time_limit


def _parameters(name: str) -> int:
    config = architectures.architecture(name).config  # which may convert a trained model first
    with torch.device("meta"):
        return architectures.AutoModelForCausalLM.from_config(config).num_parameters()


def _new_row(job: Job) -> Row:
    """tokens: of the padded batch, without its pads, and each distinct one once."""
    of = batch(job.texts, job.pairs, job.length, _WORDS, "cpu")
    tokens = [of.ids.numel(), int(of.mask.sum()), layout_of(of.ids, of.mask).size]
    about: Row = {"variant": job.variant, "pairs": job.pairs, "length": job.length}
    return about | {"texts": str(job.texts), "tokens": tokens}


def _measure_into(row: Row, job: Job) -> None:
    """Adds a turn to the row; memory and losses are those of the first."""
    absent = loop.missing(job)
    if absent is not None:
        row.update(status="refused", reason=f"needs {absent}, which is not installed")
        return
    try:
        if "runs_s" not in row and loop.is_fused(job):
            # Not where the step is measured: memory that the check frees is there already when the
            # step wants some, and 189 MiB were said of one that takes 235.
            alone(check, job)
        found = alone(measure, job)
    except (Died, RuntimeError) as error:  # whatever `measure` raised comes as RuntimeError
        line = next((part for part in str(error).splitlines() if part.strip()), "no reason given")
        row["status"] = "wrong" if line.startswith("AssertionError") else "refused"
        row["reason"] = "out of memory" if for_memory(error) else line[:200]
        return
    runs = row.get("runs_s", []) + found["runs_s"]
    median = statistics.median(runs)
    row.update({**found, **row, "status": "ok", "runs_s": runs})
    row.update({"median_s": median, "min_s": min(runs), "tokens_per_s": row["tokens"][1] / median})


def _compare(row: Row, rows: list[Row], job: Job) -> None:
    """Losses and gradient norms must be those of the first of its kind; else the times go."""
    kind = loop.BARE if job.variant in loop.BARE else loop.THROUGH_TRL
    first = next(x for x in rows if x["variant"] in kind and x.get("status") == "ok")
    allowed = torch.finfo(job.torch_dtype).eps ** 0.5
    for name in ("losses", "norms"):
        for step, (found, wanted) in enumerate(zip(row[name], first[name], strict=True)):
            if not abs(found - wanted) <= allowed * abs(wanted):
                reason = f"{name} of step {step}: {found:.6g}, of {first['variant']} {wanted:.6g}"
                row.update(status="wrong", reason=reason)
                for time_ in _TIMES:
                    del row[time_]
                return


def check(job: Job) -> None:
    """AssertionError unless the log-probabilities of the policy keep the project's rule."""
    torch.set_num_threads(job.threads)
    loop.check(job, loop.models_of(job))


def measure(job: Job) -> Row:
    """Seconds of the steps after the first, memory over the loaded models, losses."""
    torch.set_num_threads(job.threads)
    steps, seconds, peak = (_bare if job.variant in loop.BARE else _through_trl)(job)
    losses = [step.loss for step in steps]
    return {
        "first_s": seconds[0],
        "runs_s": seconds[1:],
        "extra_mib": peak.mib(),
        "total_mib": peak.total_mib(),
        "loss": losses[-1],
        "losses": losses,
        "norms": [step.norm for step in steps],
    }


Measured = tuple[list[Step], list[float], machine.Peak]  # seconds and memory of the steps


def _bare(job: Job) -> Measured:
    models = loop.models_of(job)
    steps, seconds = [], []
    with loop.bare_loop(job, models) as step:
        peak = machine.Peak(job.device)
        for _ in range(job.steps + 1):
            start = loop.now(job)
            steps.append(step(job.pairs, job.length))
            seconds.append(loop.now(job) - start)
    return steps, seconds, peak


def _through_trl(job: Job) -> Measured:
    seconds: list[float] = []
    peaks: list[machine.Peak] = []
    steps = loop.trl_steps(job, seconds, lambda: peaks.append(machine.Peak(job.device)))
    return steps, seconds, peaks[0]

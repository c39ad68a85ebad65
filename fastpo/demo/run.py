"""The demo from end to end: prepare, warm up, train with and without the patch, report."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import jobs, prepare, report
from .jobs import Job
from .objective import Objective, choose
from .options import Options

VARIANTS = {"fastpo": True, "trl": False}
TITLES = {"fastpo": "with fastpo", "trl": "TRL alone"}
WARMUP_BATCH = 8
WARMUP_RATE = 3e-3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """A folder beside the output: what is finished lies in `result`, which is renamed at the end."""

    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def start(self) -> Path:
        return self.folder / "start"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.json"


def run_demo(options: Options, say: Say = print) -> dict[str, Any]:
    """Runs the demo and returns the report that it also writes to `options.out`.

    Raises DemoError before any work for what was given, DemoFailure when a training dies; in both
    cases, and when interrupted, `options.out` is what it was before.
    """
    began = time.perf_counter()
    prepare.check_packages()
    os.environ.update(jobs.offline({}) | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    prepare.check_out(options)
    objective = choose(options.objective, options.beta)
    pairs = prepare.read_pairs(options)
    config = None if options.model is None else prepare.model_config(options)
    tokenizer = prepare.make_tokenizer(options, pairs, config)
    fitted = prepare.fit(options, pairs, tokenizer, config)
    say(report.opening(options, fitted, objective))
    stage = Stage(prepare.sibling_folder(options.out))
    try:
        runs = _train(options, fitted, objective, tokenizer, stage)
        figures = report.collect(options, fitted, objective, runs, stage.result / "model")
        figures["seconds"] = time.perf_counter() - began
        report.write(figures, stage.result)
        _put_in_place(stage.result, options.out)
    finally:
        shutil.rmtree(stage.folder, ignore_errors=True)
    say(report.closing(figures, options.out))
    return figures


def _train(
    options: Options, fitted: prepare.Fitted, objective: Objective, tokenizer: Any, stage: Stage
) -> dict[str, list[dict[str, Any]]]:
    """The events of every training by name: "warmup" if there is one, "fastpo", "trl"."""
    stage.result.mkdir()
    prepare.write_rows(fitted.pairs, stage.rows)
    job = _job(options, fitted, stage)
    runs = {}
    if options.model is None:
        new = stage.folder / "new"
        prepare.build_model(options.shape, tokenizer, options.seed, fitted.max_length, new)
        if options.warmup_steps:
            settings = {"steps": options.warmup_steps, "batch_size": WARMUP_BATCH}
            rates = {"learning_rate": WARMUP_RATE, "out": str(stage.start)}
            warm = Job(**{**job, **settings, **rates}, kind="warmup", patched=True, model=str(new))
            runs["warmup"] = list(_watch(warm, "SFT warm-up"))
        else:
            new.rename(stage.start)
    else:
        shutil.copytree(options.model, stage.start)
        tokenizer.save_pretrained(stage.start)
    job |= {"kind": "train", "model": str(stage.start), "objective": asdict(objective)}
    for name, patched in VARIANTS.items():
        out = str(stage.result / "model") if patched else None
        runs[name] = list(_watch(Job(**{**job, "patched": patched, "out": out}), TITLES[name]))
    return runs


def _job(options: Options, fitted: prepare.Fitted, stage: Stage) -> dict[str, Any]:
    """What all trainings are told."""
    held_out, most = len(fitted.pairs.held_out), options.pairs_per_step
    return {
        "rows": str(stage.rows),
        "scratch": str(stage.folder),
        "steps": options.steps,
        "batch_size": most,
        # A divisor: TRL averages over batches, which is the mean of all pairs only if they are even.
        "eval_batch_size": max(n for n in range(1, most + 1) if held_out % n == 0),
        "learning_rate": options.rate,
        "max_length": fitted.max_length,
        "seed": options.seed,
    }


def _watch(job: Job, title: str) -> Iterator[dict[str, Any]]:
    """The job's events, with a progress bar."""
    pace = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=job.steps, desc=f"{title:<11}", unit="step", mininterval=pace) as bar:
        for event in jobs.run(job, title.replace(" ", "-")):
            if "step" in event:
                shown = {"loss": f"{event['loss']:.3f}"}
                if event["accuracy"] is not None:
                    shown["reward accuracy"] = f"{event['accuracy']:.0%}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
            yield event


def _put_in_place(result: Path, out: Path) -> None:
    """An old folder is moved away first and only then deleted: `out` is never half of anything."""
    old = result.parent / "old"
    if out.exists():
        out.rename(old)
    try:
        result.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise

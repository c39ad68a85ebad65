"""The demo from end to end: prepare, warm up, train with and without the patches, report."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from . import jobs, prepare, report
from .jobs import Job
from .objective import Objective, choose
from .options import Options

# Options of `fastpo.patched`.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "fastpo": {},
    "shared": {"shared_prompts": True},
    "trl": None,
}
# The curves are one: others are only checked at their end, an evaluation of TRL costs many steps.
EVALUATIONS = {"fastpo": 4, "shared": 1, "trl": 1}
WARMUP_RATE = 3e-3
ANSWERS = 3

Say = Callable[[str], None]


def run_demo(options: Options, say: Say = print) -> dict[str, Any]:
    """Runs the demo and returns the report that it also writes to `options.out`.

    Raises DemoError before any work for what was given, DemoFailure when a training dies; in both
    cases, and when interrupted, `options.out` is what it was before.
    """
    began = time.perf_counter()
    prepare.check_packages()
    prepare.check_out(options)
    objective = choose(options.objective, options.beta)
    pairs = prepare.read_pairs(options)
    options = prepare.find_model(options, say)
    config = None if options.model is None else prepare.model_config(options)
    tokenizer = prepare.make_tokenizer(options, pairs, config)
    fitted = prepare.fit(options, pairs, tokenizer, config)
    say(report.opening(options, fitted, objective))
    stage = prepare.Stage.beside(options.out)
    try:
        stage.result.mkdir()
        tokenizer.save_pretrained(stage.tokenizer)
        prepare.write_rows(fitted.pairs, stage.rows)
        runs = _train(options, fitted, objective, stage)
        figures = report.collect(options, fitted, objective, runs)
        figures["seconds"] = time.perf_counter() - began
        report.write(figures, stage.result)
        _put_in_place(stage.result, options.out.resolve())
    finally:
        shutil.rmtree(stage.folder, ignore_errors=True)
    say(report.closing(figures, options.out))
    return figures


def _train(
    options: Options, fitted: prepare.Fitted, objective: Objective, stage: prepare.Stage
) -> dict[str, list[dict[str, Any]]]:
    """Events by name: "warmup" if there is one, `VARIANTS`, "answers" of a model that was given."""
    job = _job(options, fitted, stage)
    runs = {}
    if options.model is None:
        prepare.build_model(options.shape, options.seed, fitted.max_length, stage)
        if options.warm_up:
            warm = _warm_up_job(job, options.warm_up)
            runs["warmup"] = list(watch(warm, "SFT warm-up"))
    for name, patch in VARIANTS.items():
        out = str(stage.result / "model") if name == "fastpo" else None
        run = replace(
            job,
            patch=patch,
            out=out,
            objective=asdict(objective),
            evaluations=EVALUATIONS[name],
        )
        runs[name] = list(watch(run, report.TITLES[name]))
    if options.model is not None:
        asked = min(ANSWERS, len(fitted.pairs.held_out))
        last = replace(job, kind="answer", out=str(stage.result / "model"), steps=asked)
        runs["answers"] = list(watch(last, "answers"))
    return runs


def _job(options: Options, fitted: prepare.Fitted, stage: prepare.Stage) -> Job:
    """What all variants are told."""
    held_out, most = len(fitted.pairs.held_out), options.pairs_per_step
    return Job(
        kind="train",
        patch={},
        model=str(options.model.absolute() if options.model else stage.start),
        tokenizer=str(stage.tokenizer),
        rows=str(stage.rows),
        out=None,
        scratch=str(stage.folder),
        steps=options.steps,
        evaluations=0,
        batch_size=most,
        # A divisor: TRL averages over batches, which must be even for the mean of all pairs.
        eval_batch_size=max(n for n in range(1, most + 1) if held_out % n == 0),
        learning_rate=options.rate,
        max_length=fitted.max_length,
        seed=options.seed,
        lora=options.lora,
    )


def _warm_up_job(job: Job, steps: int) -> Job:
    """Overwrites the new model with the warm one."""
    return replace(
        job,
        kind="warmup",
        out=job.model,
        steps=steps,
        learning_rate=WARMUP_RATE,
    )


def watch(job: Job, title: str) -> Iterator[dict[str, Any]]:
    """The job's events, with a progress bar."""
    pace = 0.2 if sys.stderr.isatty() else 10.0
    shown: dict[str, str] = {}
    drawn = -pace
    unit = "prompt" if job.kind == "answer" else "step"
    with tqdm(total=job.steps, desc=f"{title:<16}", unit=unit, mininterval=pace) as bar:
        for event in jobs.run(job, title.replace(" ", "-")):
            if "device" in event:
                bar.reset()  # what went before was importing, not training
            if "step" in event:
                shown = {"loss": f"{event['loss']:.3f}"}
                if event["accuracy"] is not None:
                    shown["reward accuracy"] = f"{event['accuracy']:.0%}"
            if "evaluating" in event:
                done = f"{event['evaluating']}/{event['of']}"
                bar.set_postfix(shown | {"held-out batch": done}, refresh=False)
                if time.monotonic() - drawn >= pace:  # no step is done: tqdm would wait for one
                    bar.refresh()
                    drawn = time.monotonic()
            else:
                bar.set_postfix(shown, refresh=False)
            bar.update("step" in event or "after" in event)
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

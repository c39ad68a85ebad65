"""A DPO step: a bare loop with eager logits and with fastpo, and TRL's trainer with and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import fastpo
from fastpo.bench.step import loop
from fastpo.bench.step.batches import Texts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}[DEVICE]
# model, pairs, tokens of a row
SIZES = {"cuda": ("qwen2.5-0.5b", 4, 1024), "cpu": ("small", 2, 128)}[DEVICE]
TINY = ("tiny", 1, 32)
VARIANTS = ("eager", "fastpo", "trl", "trl + fastpo")
Step = Callable[[], float]


@contextmanager
def through_trl(job: loop.Job, folder: Path) -> Iterator[Step]:
    """What `DPOTrainer.train` does in a step, without its loop, logs and callbacks."""
    loop.hush()
    with nullcontext() if job.variant == "trl" else fastpo.patched():
        trainer = loop.trainer_of(job, loop.models_of(job), str(folder))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1

        def step() -> float:
            loss = trainer.training_step(trainer.model, trainer.data_collator(None))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return loss.item()

        yield step


@contextmanager
def steps_of(job: loop.Job, folder: Path) -> Iterator[Step]:
    if job.variant in loop.BARE:
        models = loop.models_of(job)
        loop.check(job, models)
        with loop.bare_loop(job, models) as step:
            yield lambda: step(job.pairs, job.length).loss
    else:
        with through_trl(job, folder) as step:
            yield step


@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo_step(benchmark, request, tmp_path: Path, variant: str) -> None:
    model, pairs, length = TINY if request.config.getoption("tiny") else SIZES
    threads = torch.get_num_threads()
    job = loop.Job(variant, model, DEVICE, DTYPE, pairs, length, 1, False, threads, Texts(), "wall")
    absent = loop.missing(job)
    if absent is not None:
        pytest.skip(f"needs {absent}")
    benchmark.group = f"DPO step, {model}, {pairs} x {length}"
    with steps_of(job, tmp_path) as step:
        # Policy and reference begin as one, and every step of the same batch lowers the loss.
        losses = [step() for _ in range(2)]
        assert losses[0] == pytest.approx(0.693147, abs=2e-3) and losses[1] < losses[0]
        benchmark.pedantic(step, rounds=5)

"""The trainings of the demo, as a user of TRL would write them; runs inside a worker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fastpo
from fastpo.integrations import checkpointing
from fastpo.integrations.trl.objectives.by_name import objectives_only
from fastpo.integrations.trl.objectives.setting import Setting

from .jobs import Job
from .memory import PeakMemory
from .objective import Objective

Emit = Callable[..., None]
_SAVED = "fastpo/tokens_saved"  # logged where prompts are shared


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def arguments(job: Job) -> dict[str, Any]:
    """Trainer arguments that both trainings share."""
    return {
        "output_dir": str(Path(job.scratch) / "trainer"),
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch_size,
        "per_device_eval_batch_size": job.eval_batch_size,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": job.steps // 10 if job.kind == "warmup" else 0,
        "max_length": job.max_length,
        "seed": job.seed,
        "use_cpu": device() == "cpu",
        "bf16": device() == "cuda" and torch.cuda.is_bf16_supported(),
        **checkpointing.argument(False),
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }


def warm_up(job: Job, emit: Emit) -> None:
    """SFT on all answers, good and bad: the model learns both manners and prefers neither."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side]}
        for row in job.read_rows()["train"]
        for side in ("chosen", "rejected")
    ]
    recorder = Recorder(emit, frozenset())
    with _head(job):
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
            args=SFTConfig(**arguments(job)),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job.tokenizer),
            callbacks=[recorder],
        )
        recorder.memory.loaded()
        trainer.train()
    _save(trainer, job)


def prefer(job: Job, emit: Emit) -> None:
    """Preference optimisation of the policy against its own start, evaluated on held-out pairs."""
    rows = job.read_rows()
    chosen = Objective(**(job.objective or {}))
    own = chosen.loss_type is None
    setting = Setting(chosen.key, chosen.hyperparameters) if own else Setting()
    recorder = Recorder(emit, schedule(job))
    with _head(job), objectives_only(setting):
        trainer = DPOTrainer(
            job.model,
            args=DPOConfig(**arguments(job), **chosen.trl_arguments),
            train_dataset=Dataset.from_list(rows["train"]),
            eval_dataset=Dataset.from_list(rows["held_out"]),
            processing_class=AutoTokenizer.from_pretrained(job.tokenizer),
            peft_config=_adapter() if job.lora else None,
            callbacks=[recorder],
        )
        recorder.memory.loaded()
        if job.out is not None:
            emit(prefers_chosen_before=preference(trainer, emit))
        trainer.train()
        if job.out is not None:
            emit(prefers_chosen_after=preference(trainer, emit))
    _save(trainer, job)


def schedule(job: Job) -> frozenset[int]:
    """Steps after which the held-out pairs are evaluated, evenly and always after the last."""
    parts = range(1, job.evaluations + 1)
    return frozenset(-(-job.steps * part // job.evaluations) for part in parts)


@torch.no_grad()
def preference(trainer: DPOTrainer, emit: Emit) -> float:
    """Share of held-out pairs whose chosen answer is the likelier one per token."""
    model: Any = trainer.model
    model.eval()
    wins: list[torch.Tensor] = []
    loader = trainer.get_eval_dataloader()
    for batch in loader:
        mask = batch["completion_mask"][:, 1:]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with fastpo.lazy_logits(model):
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            words = batch["input_ids"][:, 1:, None]
            logps = logits.log_softmax(-1).gather(-1, words).squeeze(-1) * mask
        chosen, rejected = (logps.sum(1) / mask.sum(1).clamp(min=1)).chunk(2)
        wins.append((chosen > rejected).float())
        emit(evaluating=len(wins), of=len(loader))
    return torch.cat(wins).mean().item()


class Recorder(TrainerCallback):
    """Sends what a training does, step by step, and its peak memory at the end."""

    def __init__(self, emit: Emit, evaluate_after: frozenset[int]) -> None:
        self.emit = emit
        self.evaluate_after = evaluate_after
        self.memory = PeakMemory(device())
        self.saved: list[float] = []
        self.predicted = 0  # batches of the evaluation that is running
        self.seconds = self.begun = 0.0

    def on_train_begin(self, *_: Any, **about: Any) -> None:
        parameters = sum(p.numel() for p in about["model"].parameters())
        self.emit(device=device(), threads=torch.get_num_threads(), parameters=parameters)
        self.memory.start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = self._now() - self.begun
        control.should_evaluate = state.global_step in self.evaluate_after

    def on_log(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        logs = about["logs"]
        if "loss" in logs:
            step = state.global_step
            # In the first step the policy is the reference, and TRL counts all those ties as 0.
            accuracy = logs.get("rewards/accuracies") if step > 1 else None
            self.saved += [logs[_SAVED]] if _SAVED in logs else []
            self.emit(step=step, loss=logs["loss"], accuracy=accuracy, seconds=self.seconds)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self.predicted += 1
        self.emit(evaluating=self.predicted, of=len(about["eval_dataloader"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self.predicted = 0
        metrics = about["metrics"]
        self.emit(
            evaluated=state.global_step,
            loss=metrics["eval_loss"],
            accuracy=metrics["eval_rewards/accuracies"],
            margin=metrics["eval_rewards/margins"],
        )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        saved = sum(self.saved) / len(self.saved) if self.saved else 0.0
        self.emit(memory=self.memory.result(), tokens_saved=saved)

    def _now(self) -> float:
        if device() == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _head(job: Job) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if job.patch is None else fastpo.patched(**job.patch)


def _adapter() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _save(trainer: Any, job: Job) -> None:
    """A whole model: an adapter alone would point to a folder that may go."""
    if job.out is not None:
        model = trainer.model.merge_and_unload() if job.lora else trainer.model
        model.save_pretrained(job.out)
        trainer.processing_class.save_pretrained(job.out)

"""TRL's trainers on tiny models, built and run as a script would."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import _tiny as tiny
import trl
from datasets import Dataset
from torch import Tensor

TIMINGS = {"runtime", "samples_per_second", "steps_per_second", "step_time"}
Log = dict[str, Any]


def build(
    prefix: str,  # TRL's: DPO for DPOTrainer and DPOConfig
    folder: Path,
    model: Any,
    data: Dataset,
    changes: dict[str, Any],  # of the config
    **arguments: Any,  # of the trainer
) -> Any:
    """A trainer of three steps. SGD, because Adam would hide a gradient of the wrong scale."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    module = trl
    if not hasattr(trl, f"{prefix}Trainer"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL's notice that its experiments may change
            module = importlib.import_module(f"trl.experimental.{prefix.lower()}")
    return getattr(module, f"{prefix}Trainer")(
        model=model,
        args=getattr(module, f"{prefix}Config")(**{**settings, **changes}),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        **arguments,
    )


def train(trainer: Any) -> tuple[list[Log], dict[str, Tensor]]:
    """The log of each step, without its timings, and the final parameters."""
    trainer.train()
    logs = [
        {key: value for key, value in log.items() if not key.endswith(tuple(TIMINGS))}
        for log in trainer.state.log_history
    ]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

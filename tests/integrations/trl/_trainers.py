"""TRL's trainers on tiny models, built and run as a script would, and two runs compared."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _tiny as tiny
import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor

import fastpo

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "step_time")
# Packages of trl.experimental that are not the prefix in lower case.
PACKAGES = {
    "OnlineDPO": "online_dpo",
    "IWOPD": "iw_opd",
    "ServerDistillation": "server_distillation",
}
# What each trainer is fed: TRL's prefix, rows.
DATA = {
    "DPO": tiny.preferences,
    "KTO": tiny.unpaired,
    "SFT": tiny.conversations,
    "GRPO": tiny.prompts,
    "GMPO": tiny.prompts,
    "RLOO": tiny.prompts,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
Log = dict[str, Any]
Run = tuple[list[Log], dict[str, Tensor]]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Of sampled tokens, not of their text: most words of a model may be none of the tokenizer."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def lora(**changes: Any) -> Any:
    """An adapter's configuration."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{**LORA, **changes})


def saved(folder: Path, name: str = "llama") -> str:
    """The path of a tiny model, written there once."""
    path = folder / "model"
    if not path.exists():
        tiny.model(name).save_pretrained(path)
    return str(path)


def module(prefix: str) -> Any:
    """Where TRL keeps `<prefix>Trainer` and `<prefix>Config`."""
    if hasattr(trl, f"{prefix}Trainer"):
        return trl
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's notice that its experiments may change
        return importlib.import_module(f"trl.experimental.{PACKAGES.get(prefix, prefix.lower())}")


def config(prefix: str, folder: Path, changes: dict[str, Any]) -> Any:
    """Three steps of SGD: Adam would hide a gradient of the wrong scale."""
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
    return getattr(module(prefix), f"{prefix}Config")(**{**settings, **changes})


def build(
    prefix: str,  # TRL's: DPO for DPOTrainer and DPOConfig
    folder: Path,
    model: Any,
    data: Dataset,
    changes: dict[str, Any],  # of the config
    **arguments: Any,  # of the trainer
) -> Any:
    torch.manual_seed(0)  # TRL before 1.15 draws the weights of an adapter unseeded
    return getattr(module(prefix), f"{prefix}Trainer")(
        model=model,
        args=config(prefix, folder, changes),
        train_dataset=data,
        **{"processing_class": tiny.tokenizer(), **arguments},
    )


def train(trainer: Any) -> Run:
    """The log of each step, without its timings, and the final parameters."""
    trainer.train()
    logs = [
        {key: value for key, value in log.items() if not key.endswith(TIMINGS)}
        for log in trainer.state.log_history
    ]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def assert_same(ours: Run, own: Run) -> None:
    """The same losses, metrics and parameters after steps that changed something."""
    assert any(log.get("grad_norm", 0) > 0 for log in own[0])
    assert_same_logs(ours[0], own[0])
    torch.testing.assert_close(ours[1], own[1], rtol=1e-4, atol=1e-5)


def assert_same_logs(ours: list[Log], own: list[Log]) -> None:
    assert len(ours) == len(own)
    for log, own_log in zip(ours, own, strict=True):
        skipped = undecided(own_log)
        compared = ({k: v for k, v in x.items() if k not in skipped} for x in (log, own_log))
        assert next(compared) == pytest.approx(next(compared), rel=1e-4, abs=1e-4)
        # A loss may be a thousandth itself, DFT's for one.
        assert log.get("loss", 0) == pytest.approx(own_log.get("loss", 0), rel=1e-4, abs=1e-6)


def undecided(log: Log) -> set[str]:
    """Accuracies of margins that are rounding errors, as before the first step."""
    margins = {name: value for name, value in log.items() if name.endswith("rewards/margins")}
    near = [name for name, value in margins.items() if abs(value) < 1e-5]
    return {name.replace("margins", "accuracies") for name in near}


def assert_trains_the_same(make: Callable[[], Any], calls: list[Any]) -> None:
    """`make()` builds a trainer; `calls` fills up while fastpo computes."""
    runs = []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            runs.append(train(make()))
        assert bool(calls) == patched
    own, ours = runs
    assert_same(ours, own)

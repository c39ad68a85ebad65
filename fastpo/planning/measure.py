"""The same step on the device that is there, and what it really held."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..bench.machine import Peak
from ..bench.process import alone, for_memory
from ..integrations.sharing.backbone import shared_prompts
from .fits import cut
from .models import build, optimizer_of
from .quantised import library
from .setting import Setting
from .steps import Step, batch_of

_STEPS = 2
_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class _Job:
    setting: Setting
    config: Any
    head: str
    teacher: Any = None

    @property
    def device(self) -> str:
        return self.setting.device


def check(setting: Setting) -> None:
    """ValueError for what is not there to measure with: asked here, where it is no failure of a
    process."""
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that is there to measure, got cuda")
    if setting.devices > 1:
        raise ValueError(f"devices: expected 1 to measure, got {setting.devices}")
    if setting.load_in_4bit:
        library()
    if setting.attention == "flash" and setting.prompt_rows > 1 and setting.device == "cpu":
        raise ValueError("attention: expected sdpa to measure shared prompts on a cpu, got flash")


def measure(setting: Setting, config: Any, head: str, teacher: Any = None) -> int | str:
    """Bytes at the peak of a step: of tensors on a GPU, else resident in a process of its own,
    beyond what it held before there was a model. "out of memory" where it has no peak.

    Of a setting that `check` has nothing against.
    """
    try:
        found: int = alone(_run, _Job(setting, config, head, teacher))
    except RuntimeError as error:
        if for_memory(error):
            return "out of memory"
        line = " ".join(str(error).split())[:200]  # of a process, which has its traceback
        raise ValueError(f"measure: expected a step that runs, got {line}") from error
    return found


def _run(job: _Job) -> int:
    if job.device == "cpu":
        _give_back()
    teacher = None if job.teacher is None else _tiny(job.teacher)
    _step(_Job(replace(job.setting, context=8, batch=1), _tiny(job.config), job.head, teacher))
    peak = Peak(job.device)
    _step(job)
    return int(peak.mib() * 2**20)


def _give_back() -> None:
    """What is freed leaves the process at once: glibc's heap would keep holes between tensors of a
    few MiB, which its aligned blocks do not fit into again, as large as the tensors in sum."""
    with suppress(OSError, AttributeError):  # another C library has other ways
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**16)


def _tiny(config: Any) -> Any:
    """Of the same kind: what is imported and set up at first use is no part of a step."""
    return cut(config, [0])


def _step(job: _Job) -> None:
    setting = job.setting
    with torch.device(job.device):
        models = build(setting, job.config, job.teacher)
        trained = [p for p in models.policy.parameters() if p.requires_grad]
        optimizer = optimizer_of(setting, trained)
        step = Step(setting, models, job.head, optimizer, lambda name: nullcontext())
        batch = batch_of(setting, job.config.get_text_config().vocab_size)
        with ExitStack() as stack:
            if job.head == "fastpo" and setting.prompt_rows > 1:
                for model in filter(None, (models.base, models.copied)):
                    stack.enter_context(shared_prompts(model))
            for _ in range(_STEPS):
                step.run(batch)

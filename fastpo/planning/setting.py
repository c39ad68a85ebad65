"""What a step is made of, as options say it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ops.walks.checks import check_budget, check_flag, check_integer, check_number
from .names import (
    ALONE,
    ATTENTION,
    DTYPES,
    OPTIMIZERS,
    PRECOMPUTES,
    PROMPT_ROWS,
    REFERENCES,
    STRATEGIES,
    TRAINERS,
)

HEADS = ("trl", "fastpo")
MOST_TOKENS = 2**24  # of a step; beyond, sizes of tensors leave 64 bits


@dataclass(frozen=True)
class Lora:
    """targets: names of linear layers, or "all-linear"."""

    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)

    @classmethod
    def parse(cls, text: str) -> Lora:
        """`r=16,targets=q_proj+v_proj`, or one of the two."""
        targets = r"targets=([\w.-]+(?:\+[\w.-]+)*)"
        found = re.fullmatch(rf"(?:(?:r=)?(\d+)(?:,(?=.)|$))?(?:{targets})?", text)
        if not text or found is None or int(found[1] or 16) < 1:
            raise ValueError(f"lora: expected r=16,targets=q_proj+v_proj, got {text!r}")
        return cls(int(found[1] or 16), tuple((found[2] or "all-linear").split("+")))


@dataclass(frozen=True)
class Setting:
    """One step. teacher: None for one as large as the model; memory: bytes of a device; context:
    tokens of a row, prompt and answer; batch: items of a device, pairs for DPO; prompt: its share
    of the context; attention: "sdpa" has a mask of padded rows, "flash" none;
    load_in_4bit: the adapted model as bitsandbytes has it; checkpointing: "none", "layers" or
    "offload"; reference: None for what the trainer does by
    itself; prompt_rows: how many rows have the same prompt, which fastpo computes once.
    """

    model: str | Path
    teacher: str | Path | None = None
    trainer: str = "dpo"
    memory: int | None = None
    dtype: str = "bf16"
    device: str = "cuda"
    context: int = 2048
    batch: int = 1
    prompt: float = 0.5
    prompt_rows: int = 1
    lora: Lora | None = None
    load_in_4bit: bool = False
    optimizer: str = "adamw"
    attention: str = "sdpa"
    checkpointing: str = "none"
    reference: str | None = None
    budget: int | None = None
    devices: int = 1
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "trainer": (self.trainer, tuple(TRAINERS)),
            "dtype": (self.dtype, DTYPES),
            "device": (self.device, ("cuda", "cpu")),
            "optimizer": (self.optimizer, OPTIMIZERS),
            "attention": (self.attention, ATTENTION),
            "checkpointing": (self.checkpointing, ("none", "layers", "offload")),
            "reference": (self.reference, (None, *REFERENCES)),
            "strategy": (self.strategy, STRATEGIES),
        }
        for name, (got, known) in choices.items():
            if got not in known:
                expected = ", ".join(str(x) for x in known if x is not None)
                raise ValueError(f"{name}: expected one of {expected}, got {got!r}")
        least: Callable[[Any], bool] = lambda x: x >= 1  # noqa: E731
        for name in ("context", "batch", "devices", "prompt_rows"):
            check_integer(name, getattr(self, name), "an integer >= 1", least)
        if self.context < 2:
            raise ValueError(f"context: expected an integer >= 2, got {self.context}")
        if self.rows * self.context > MOST_TOKENS:
            asked = f"{self.rows} rows of {self.context}"
            expected = f"at most {MOST_TOKENS} tokens in a step"
            raise ValueError(f"context: expected {expected}, got {asked}")
        check_budget(self.budget)
        check_flag("load_in_4bit", self.load_in_4bit)
        check_number("prompt", self.prompt, "a number in [0, 1)", lambda x: 0 <= x < 1)
        if self.load_in_4bit and self.lora is None:
            raise ValueError("load_in_4bit: expected an adapter (lora) with it, got none")
        if (self.attention, self.dtype, self.device) == ("flash", "fp32", "cuda"):
            raise ValueError(
                "attention: expected sdpa with fp32, which flash kernels lack, got flash"
            )
        self._check_others()

    def _check_others(self) -> None:
        """What the trainer scores besides the policy, or does not."""
        if self.reference == "adapter-off" and self.lora is None:
            raise ValueError("reference: expected an adapter (lora) with adapter-off, got none")
        if self.reference == "precomputed" and self.trainer not in PRECOMPUTES:
            wanted = f"one of {', '.join(PRECOMPUTES)} with precomputed"
            raise ValueError(f"reference: expected {wanted}, got {self.trainer}")
        if self.trainer in PRECOMPUTES and self.reference == "none":
            wanted = f"one of {', '.join(REFERENCES[:-1])} for {self.trainer}"
            raise ValueError(f"reference: expected {wanted}, whose loss has one, got 'none'")
        if self.trainer in ALONE and self.reference not in (None, "none"):
            raise ValueError(f"reference: expected none for {self.trainer}, got {self.reference!r}")
        if self.distils and self.reference not in (None, "model"):
            wanted = f"none beside the teacher of {self.trainer}"
            raise ValueError(f"reference: expected {wanted}, got {self.reference!r}")
        if self.teacher is not None and not self.distils:
            raise ValueError(f"teacher: expected none for {self.trainer}, got {self.teacher!r}")

    @property
    def rows(self) -> int:
        return self.batch * TRAINERS[self.trainer][0]

    @property
    def scored(self) -> int:
        """Tokens of an answer."""
        return self.context - self.prompt_tokens

    @property
    def prompt_tokens(self) -> int:
        """At least one, which predicts the first of the answer."""
        return max(1, int(self.context * self.prompt))

    @property
    def distils(self) -> bool:
        return TRAINERS[self.trainer][1] == "teacher"

    @property
    def other(self) -> str:
        """What is scored besides the policy: a model, the policy unadapted, or nothing."""
        wanted = TRAINERS[self.trainer][1]
        if self.distils:
            return "model"
        if wanted is None:
            return self.reference or "none"
        return self.reference or ("model" if self.lora is None else "adapter-off")


def of_ratio(text: str, trainer: str) -> dict[str, Any]:
    """Fields of a `Setting`, of `P:C` or `P:C,K`; nothing of the prompt's size where it is ""."""
    found = re.fullmatch(r"(?:(\d+):(\d+)(?:,(\d+))?)?", str(text))
    numbers = [] if found is None else [int(x) for x in found.groups() if x is not None]
    if found is None or 0 in numbers:
        wanted = "P:C, prompt to answer, or P:C,K with K rows of a prompt"
        raise ValueError(f"shared_prompts: expected {wanted}, got {text!r}")
    rows = found[3] or PROMPT_ROWS.get(trainer)
    if rows is None:
        wanted = f"P:C,K with K rows of a prompt for {trainer}"
        raise ValueError(f"shared_prompts: expected {wanted}, got {text!r}")
    fields: dict[str, Any] = {"prompt_rows": int(rows)}
    if found[1] is not None:
        fields["prompt"] = int(found[1]) / (int(found[1]) + int(found[2]))
    return fields

"""What a demo run is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .data import HELD_OUT_MAX
from .errors import DemoError

WARMUP_STEPS = 160


@dataclass(frozen=True)
class Shape:
    """The built model: Llama with a vocabulary of real size, so that the head dominates."""

    vocab: int = 32768
    hidden: int = 128
    layers: int = 4
    heads: int = 4


@dataclass(frozen=True)
class Options:
    """One run of the demo. None: chosen by what is given, see the properties.

    data: pairs as TRL has them, with or without a prompt, as JSONL, a JSON array or Parquet; None:
        the embedded ones.
    model: a folder of `save_pretrained`, or "smollm2"; None: a small model, built and warmed up on
        the data.
    lora: train an adapter and merge it in the end; else all weights.
    eval_rows: most held-out pairs to evaluate on.
    """

    data: Path | None = None
    model: Path | None = None
    objective: str = "dpo"
    beta: float | None = None
    steps: int = 24
    batch_size: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    truncate: bool = False
    warmup_steps: int | None = None
    lora: bool = False
    eval_rows: int | None = None
    seed: int = 0
    out: Path = Path("fastpo-demo")
    overwrite: bool = False
    shape: Shape = Shape()

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "max_length": 8, "warmup_steps": 0, "seed": 0}
        least |= {"eval_rows": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise DemoError(f"--{_flag(name)}: expected an integer >= {low}, got {value}")
        if self.model is not None and self.warmup_steps:
            raise DemoError("--warmup-steps: only the built model is warmed up, not --model")
        if self.seed >= 2**32:
            raise DemoError(f"--seed: expected an integer below 2**32, got {self.seed}")
        for name in ("beta", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DemoError(f"--{_flag(name)}: expected a finite number > 0, got {value}")

    @property
    def warm_up(self) -> int:
        """Steps of SFT before."""
        if self.model is not None:
            return 0
        return WARMUP_STEPS if self.warmup_steps is None else self.warmup_steps

    @property
    def pairs_per_step(self) -> int:
        """Real rows are ten times as long as the embedded ones."""
        return self.batch_size or (8 if self.data is None else 4)

    @property
    def most_held_out(self) -> int:
        """A model worth its name takes minutes over what the built one is asked in seconds."""
        return self.eval_rows or (HELD_OUT_MAX if self.model is None else 16)

    @property
    def rate(self) -> float:
        """The built model is small and new; one that was trained before would be torn apart."""
        given = 1e-4 if self.lora else 5e-6
        return self.learning_rate or (1e-3 if self.model is None else given)


def _flag(name: str) -> str:
    return name.replace("_", "-")

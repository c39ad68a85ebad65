"""What options may be called. Without torch: the help of the command reads it, too, and what is
wrong is said at once."""

from __future__ import annotations

from pathlib import Path

# name: rows of a batch for each of its items, and what of it is scored besides the policy.
TRAINERS = {
    "dpo": (2, "reference"),
    "kto": (1, "reference"),
    "sft": (1, None),
    "cpo": (2, None),
    "orpo": (2, None),
    "grpo": (1, None),
    "rloo": (1, "reference"),
    "gkd": (1, "teacher"),
    "distillation": (1, "teacher"),
}
# These build the logits of all positions in TRL; for the others it has a fused head.
LOGITS = ("cpo", "orpo", "gkd")
SAMPLES = ("grpo", "rloo", "distillation")  # their configs know the length of completions only
GENERATIONS = {"grpo": 8, "rloo": 2}  # TRL's num_generations
# Rows of a prompt where nothing else is said.
PROMPT_ROWS = {"dpo": 2, "cpo": 2, "orpo": 2, **GENERATIONS}
DTYPES = ("bf16", "bf16-mixed", "fp16", "fp32")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "sgd")
REFERENCES = ("model", "adapter-off", "precomputed", "none")
DROPOUT = ("sft", "grpo", "rloo", "distillation")  # the configs of others disable it
KBIT = ("cpo", "orpo")  # by PEFT's prepare_model_for_kbit_training; others have a bfloat16 adapter
PRECOMPUTES = ("dpo", "kto")
ALONE = ("sft", "cpo", "orpo")  # no setting of theirs has a reference
ATTENTION = ("sdpa", "flash")
STRATEGIES = ("ddp", "fsdp2", "zero3")


def check_path(model: str | Path, name: str) -> None:
    if not Path(model).exists():
        raise ValueError(f"{name}: expected a folder or a config.json, got {str(model)!r}")

"""What options may be called. Without torch: the help of the command reads it, too."""

from __future__ import annotations

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
# Rows of a prompt where nothing else is said: pairs, and TRL's num_generations.
PROMPT_ROWS = {"dpo": 2, "cpo": 2, "orpo": 2, "grpo": 8, "rloo": 8}
DTYPES = ("bf16", "bf16-mixed", "fp16", "fp32")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "sgd")
REFERENCES = ("model", "adapter-off", "precomputed", "none")
ATTENTION = ("sdpa", "flash")
STRATEGIES = ("ddp", "fsdp2", "zero3")

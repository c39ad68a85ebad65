"""Activation checkpointing by the name that the installed transformers has for it.

Since 5.23 models and arguments of trainers warn where they are asked by `gradient_checkpointing`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel, TrainingArguments


def enable(model: PreTrainedModel) -> None:
    """Not reentrant."""
    found = getattr(model, "activation_checkpointing_enable", None)
    (found or model.gradient_checkpointing_enable)({"use_reentrant": False})


def argument(wanted: bool) -> dict[str, Any]:
    """The keyword of `TrainingArguments` and of TRL's configs."""
    known = {field.name for field in fields(TrainingArguments)}
    new, old = "activation_checkpointing", "gradient_checkpointing"
    return {new if new in known else old: wanted}

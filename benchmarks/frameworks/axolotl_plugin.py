"""What Axolotl's configurations name: a seed for new adapters, rewards of GRPO and its prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin


class Seeded(BasePlugin):
    """Its own `seed` is set after the adapters are drawn."""

    def pre_model_load(self, cfg: Any) -> None:
        torch.manual_seed(cfg.seed)


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [len(text) % 7 / 7 for text in completions]


def prompts(cfg: Any, **_: Any) -> Callable[..., dict[str, str]]:
    return lambda row, tokenizer=None: {"prompt": row["prompt"]}

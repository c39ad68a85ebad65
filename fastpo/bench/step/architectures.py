"""Real architectures with random weights, and a trained model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.utils import logging

from ...demo import smollm2
from ...demo.errors import DemoError
from ...integrations.checkpointing import enable
from ..errors import BenchError

RANK, ADAPTED = 16, ("q_proj", "v_proj")
# Lengths are bounded by memory here; a rope of any length costs nothing.
POSITIONS = 2**20


@dataclass(frozen=True)
class Architecture:
    """lora: low-rank adapters on the attention's q and v; head and body are frozen. folder: of
    trained weights."""

    name: str
    config: Any
    lora: bool = False
    folder: Path | None = None


def _config(
    kind: Any, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, tied: bool
) -> Any:
    return kind(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
    )


def architecture(name: str) -> Architecture:
    if name == TRAINED:
        try:
            folder = smollm2.converted(print)
        except DemoError as error:
            raise BenchError(str(error)) from error
        return Architecture(name, AutoConfig.from_pretrained(folder), folder=folder)
    return Architecture(name, MODELS[name](), lora=name.endswith("-lora"))


_qwen2, _llama = (partial(_config, kind, tied=True) for kind in (Qwen2Config, LlamaConfig))
MODELS = {
    "tiny": partial(_qwen2, 32, 64, 1, 2, 1, 512),
    "small": partial(_qwen2, 128, 384, 4, 4, 2, 32_768),
    "medium": partial(_llama, 512, 1536, 4, 8, 4, 32_000),
    "smollm2-135m": partial(_llama, 576, 1536, 30, 9, 3, 49_152),
    "qwen2.5-0.5b": partial(_qwen2, 896, 4864, 24, 14, 2, 151_936),
    "qwen2.5-1.5b": partial(_qwen2, 1536, 8960, 28, 12, 2, 151_936),
    "llama-3-8b-lora": partial(_llama, 4096, 14_336, 32, 32, 8, 128_256, tied=False),
}
TRAINED = str(smollm2.NAME)
NAMES = (*MODELS, TRAINED)


class LowRank(nn.Module):
    """A linear layer plus scale·(x·downᵀ)·upᵀ; its own, because PEFT may not be there."""

    enabled = True

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        down = torch.randn(RANK, base.in_features) / RANK
        self.down = nn.Parameter(down.to(base.weight))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not LowRank.enabled:
            return y
        return y + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


@dataclass(frozen=True)
class Models:
    """The policy, and what scores as the reference: a frozen copy, or the policy unadapted."""

    policy: PreTrainedModel
    copied: PreTrainedModel | None

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        LowRank.enabled = self.copied is not None
        try:
            with torch.no_grad():
                yield self.policy if self.copied is None else self.copied
        finally:
            LowRank.enabled = True


def build(
    of: Architecture, device: str, dtype: torch.dtype, *, checkpointing: bool, adapted: bool
) -> Models:
    """adapted: with this file's adapters where the architecture has some; else PEFT brings its."""
    torch.manual_seed(0)
    with torch.device(device):
        policy = _policy(of, dtype)
    policy.config.use_cache = False
    if of.lora:
        policy.requires_grad_(False)
        _adapt(policy if adapted else nn.Module())
    copied = None if of.lora else copy.deepcopy(policy).requires_grad_(False).eval()
    if checkpointing:
        enable(policy)
    return Models(policy.train(), copied)


def _policy(of: Architecture, dtype: torch.dtype) -> Any:
    if of.folder is None:
        return AutoModelForCausalLM.from_config(of.config, dtype=dtype)
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(of.folder, dtype=dtype)


def _adapt(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in ADAPTED and isinstance(child, nn.Linear):
                setattr(parent, name, LowRank(child))

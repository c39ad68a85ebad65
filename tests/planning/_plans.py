"""Small models that plans are made of."""

from __future__ import annotations

import importlib

from transformers import LlamaConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 3000,
}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=5)
THREE = LlamaConfig(**SIZES, num_hidden_layers=3)
TWO = LlamaConfig(**SIZES, num_hidden_layers=2)
SHALLOW = LlamaConfig(**SIZES, num_hidden_layers=1)


def module_of(trainer):
    """Where TRL has it."""
    place = f"experimental.{trainer}" if trainer in ("cpo", "orpo", "gkd") else "trainer"
    return importlib.import_module(f"trl.{place}")

"""Attention as a flash kernel has it: causal, no mask, keys and values once for their groups.

transformers' registries know it under a name of its own. What it keeps for the backward is what
FlashAttention keeps: queries, keys, values, the result and a number for each query and head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "fastpo_unmasked"  # with "flash" in it transformers would look for a kernel


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Any = None,
    **_: Any,
) -> None:
    """None: causal."""


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def register() -> str:
    """The implementation's name, for a model's config."""
    AttentionMaskInterface.register(NAME, _mask)
    AttentionInterface.register(NAME, _attend)
    return NAME

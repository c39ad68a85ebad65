"""What ms-swift is told to import: rewards of GRPO, and rows without padding on a CPU.

FlashAttention wants a GPU; under its name stands PyTorch's attention with a mask of rows.
"""

from __future__ import annotations

from typing import Any

from swift.rewards import ORM, orms
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel


class Lengths(ORM):
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [len(text) % 7 / 7 for text in completions]


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    position_ids: Tensor,  # [1, T], from 0 on for every row
    **options: Any,
) -> Any:
    row = (position_ids == 0).cumsum(-1)
    mask = (row[:, :, None] == row[:, None, :]).tril()[:, None]
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)


orms["lengths"] = Lengths
ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = attention
PreTrainedModel._check_and_adjust_attn_implementation = lambda self, wanted, *_, **__: (
    wanted or "sdpa"
)

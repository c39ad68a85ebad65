"""Rows that begin alike, and the backbone on each distinct token of them once."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..integrations.sharing import attention
from ..integrations.sharing.backbone import Packer, layer_cost
from ..layout.cost import is_worth
from ..layout.tree import Layout, layout_of
from .names import PROMPT_ROWS

_LEAST = 16  # tokens in common, as `shared_prompts` has it


def of_ratio(text: str, trainer: str) -> dict[str, Any]:
    """Fields of a `Setting`, of `P:C` or `P:C,K`; nothing of the prompt's size where it is ""."""
    if trainer not in PROMPT_ROWS:
        names = ", ".join(PROMPT_ROWS)
        raise ValueError(f"shared_prompts: expected one of the trainers {names}, got {trainer!r}")
    found = re.fullmatch(r"(?:(\d+):(\d+)(?:,(\d+))?)?", text)
    numbers = [] if found is None else [int(x) for x in found.groups() if x is not None]
    if found is None or 0 in numbers:
        wanted = "P:C, prompt to answer, or P:C,K with K rows of a prompt"
        raise ValueError(f"shared_prompts: expected {wanted}, got {text!r}")
    fields: dict[str, Any] = {"prompt_rows": int(found[3] or PROMPT_ROWS[trainer])}
    if found[1] is not None:
        fields["prompt"] = int(found[1]) / (int(found[1]) + int(found[2]))
    return fields


def layout_for(model: Any, ids: Tensor) -> Layout | None:
    """What `shared_prompts` would pack the rows into; None where padded they cost less.

    Outside of the mode in which tensors hold nothing: it looks at the words.
    """
    with unset_fake_temporarily():
        mask, cost = torch.ones_like(ids), layer_cost(model.base_model)
        layout = layout_of(ids, mask, least=_LEAST)
        if cost.loses(layout):
            layout = min(layout, layout_of(ids, mask, share=False), key=cost.packed)
        return layout if is_worth(cost, layout) else None


def packed(model: Any, inputs: dict[str, Any], layout: Layout) -> Any:
    """The backbone's output, padded again."""
    attention.install(model.config.get_text_config()._attn_implementation)
    return Packer().packed(model.base_model, inputs, layout)

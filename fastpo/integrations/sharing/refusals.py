"""Which models and which calls are left as they are, each by its reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import Refused

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
# What a call may bring besides ids and mask, with the values that change nothing here.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "position_ids": (),  # compared with the columns
    "use_cache": (None, False),
    "past_key_values": (None,),
    "output_attentions": (None, False),
    "return_dict": (None, True),
    "inputs_embeds": (None,),
}


def check_model(model: Any) -> None:
    """Raises Refused for a backbone whose layers need neighbours in a row to be neighbours."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        raise Refused("a state along the row")
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds:
        raise Refused(f"layers of {', '.join(sorted(kinds))}")
    if not getattr(model, "_supports_attention_backend", False):
        raise Refused("attention that is not looked up in transformers' registry")
    if getattr(config, "is_causal", True) is False or getattr(config, "is_encoder_decoder", False):
        raise Refused("attention that is not causal")


def check_call(inputs: dict[str, Any]) -> None:
    """Raises Refused for a call with more than ids [R, T] and a mask [R, T]."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise Refused("no input_ids of shape (R, T)")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        raise Refused("an attention_mask of another shape than input_ids")
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask") or value is None:
            continue
        if name == "position_ids":
            _check_positions(value, ids)
        elif (
            (name in _HARMLESS and not any(value is allowed for allowed in _HARMLESS[name]))
            or isinstance(value, Tensor)
            or name.startswith("cu_seq")
        ):
            raise Refused(f"{name} is given")


def _check_positions(positions: Tensor, ids: Tensor) -> None:
    columns = torch.arange(ids.shape[1], dtype=positions.dtype, device=positions.device)
    if positions.shape[-1] != ids.shape[1] or not bool((positions == columns).all()):
        raise Refused("position_ids that are not the columns")


def drops(model: nn.Module) -> bool:
    """Is any dropout active? Tokens that are computed once would be dropped together."""
    if not model.training:
        return False
    config = getattr(model, "config", None)
    rates = [getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop")]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(rate for rate in rates if isinstance(rate, float))

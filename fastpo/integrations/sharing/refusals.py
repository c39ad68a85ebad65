"""Which models and which calls are left as they are, each by its reason."""

from __future__ import annotations

import sys
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import modeling_utils

from ...layout.tree import Layout
from ..seams import hooks
from .packed import Refused

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
# Whose forward hooks are known to take a packed row as any other.
_KNOWN = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "trl")
# What a call may bring besides ids and mask, with the values that change nothing here.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "position_ids": (),  # compared with the columns
    "use_cache": (False,),
    "past_key_values": (),
    "cache": (),  # its name since transformers 5.24
    "output_attentions": (False,),
    "return_dict": (True,),
    "inputs_embeds": (),
}
# What models for pictures hand on: Gemma 3 and 4 what their head needs, LLaVA which layers see.
_ELSEWHERE = ("labels", "vision_feature_layer")


def check_head(model: Any) -> None:
    """Raises Refused for a model that is its own backbone."""
    if model.get_output_embeddings() is not None:
        raise Refused("its head is not on a backbone of its own")


def check_model(model: Any) -> None:
    """Raises Refused for a backbone whose layers need neighbours in a row to be neighbours."""
    config = model.config.get_text_config()
    check_head(model)
    if getattr(model, "_is_stateful", False):
        raise Refused("a state along the row")
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds:
        raise Refused(f"layers of {', '.join(sorted(kinds))}")
    registries = _registries(model)
    if not registries:
        raise Refused("attention that is not looked up in transformers' registry")
    if any(found is not modeling_utils.ALL_ATTENTION_FUNCTIONS for found in registries):
        raise Refused("attention that is looked up in a registry of its own")
    if getattr(config, "is_causal", True) is False:
        raise Refused("attention that is not causal")
    if any(isinstance(layer, _BatchNorm) and layer.training for layer in model.modules()):
        raise Refused("statistics over a batch")  # which a probe would change
    if getattr(config, "attn_temperature_tuning", False):
        # Llama 4's, by the place in the tensor that it is called with: no probe is as long.
        raise Refused("queries that are scaled by their place in the tensor")
    if _splits_rows():
        raise Refused("rows that are split between processes")
    if any(getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention")):
        raise Refused("attention to another sequence")


def _registries(model: nn.Module) -> list[Any]:
    """Where the files of its layers look attention functions up."""
    files = {type(module).__module__ for module in model.modules()} & sys.modules.keys()
    found = (getattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS", None) for file in files)
    return [registry for registry in found if registry is not None]


def _splits_rows() -> bool:
    """Does each process hold a part of every row?"""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return False
    parallelism = state.AcceleratorState().parallelism_config
    return parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)


def check_config(config: Any, inputs: dict[str, Any]) -> None:
    """Raises Refused for what it asks of every call that does not say otherwise."""
    for name, default in (("output_attentions", False), ("return_dict", True)):
        if inputs.get(name) is None and getattr(config, name, default) is not default:
            raise Refused(f"{name} is set in its config")


def check_call(model: Any, inputs: dict[str, Any]) -> None:
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
            _check_positions(value, ids, mask)
        elif name in _ELSEWHERE and type(model).__module__.startswith("transformers."):
            continue
        elif not any(x is value for x in _HARMLESS[name]) if name in _HARMLESS else _of_rows(value):
            raise Refused(f"{name} is given")


def _of_rows(value: Any) -> bool:
    """May it be of tokens or rows? A single number is not."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    return not isinstance(value, str | Number)


def _check_positions(positions: Any, ids: Tensor, mask: Tensor | None) -> None:
    """At pads they are of no token."""
    if isinstance(positions, Tensor) and positions.shape[-2:] in (ids.shape, (1, ids.shape[1])):
        columns = torch.arange(ids.shape[1], dtype=positions.dtype, device=positions.device)
        same = positions == columns
        if mask is not None:
            same = same | (mask.to(same.device) == 0)
        if bool(same.all()):
            return
    raise Refused("position_ids that are not the columns")


def check_rotation(model: Any, layout: Layout) -> None:
    """Raises Refused where angles depend on the longest row, and only pads make it that long."""
    last, width = layout.columns, layout.shape[1]
    if last == width:
        return
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(x for x in given.values() if isinstance(x, dict))):
        kind = str(rope.get("rope_type"))
        lengths = (
            rope.get("original_max_position_embeddings"),
            getattr(config, "max_position_embeddings", None),
        )
        limit = min((x for x in lengths if x is not None), default=width + 1)
        # longrope has two tables; the angles of dynamic scaling go on changing beyond the limit.
        if width >= limit and ("dynamic" in kind or (kind == "longrope" and last <= limit)):
            raise Refused(f"pads beyond the {limit} tokens at which its rope changes")


def sharded(model: nn.Module) -> bool:
    """Does a forward wait for other processes? Parameters of FSDP and of ZeRO-3 say so."""
    return any(hasattr(x, "placements") or hasattr(x, "ds_id") for x in model.parameters())


def watching(model: nn.Module) -> str | None:
    """A forward hook of the caller's inside of it, by name."""
    layers = (layer for layer in model.modules() if layer is not model)
    found = (hook for layer in layers for hook in hooks.hooks(layer, hooks.FORWARD))
    own = (x for x in found if getattr(x, "__module__", "").split(".")[0] not in _KNOWN)
    return next(map(hooks.name, own), None)

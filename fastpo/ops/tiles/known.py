"""Which layers are quantised, and how their words are made."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..walks.checks import DTYPES
from .bitsandbytes import EightBit, FourBit
from .tiled import TileSource
from .torchao import Subclass


def tile_source(layer: Any, dtype: torch.dtype | None = None) -> TileSource:
    """The words of a quantised linear layer, or of its weight, for `fastpo.linear_logps`.

    layer: bitsandbytes' `Linear4bit` or `Linear8bitLt` (without weights in float16), a
        `torch.nn.Linear` whose weight is a tensor of torchao's, quantised alone; or such a weight.
    dtype: of the tiles. None: what the layer multiplies in, or what its weight was made from.

    For other formats see `fastpo.BlockScaled` and `fastpo.NVFP4`, or write a class with shape,
    dtype, device and tile(v0, v1). Raises ValueError for what is not quantised, RuntimeError for
    what is, but in a way that is not known.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or None, got {dtype!r}")
    kind = _kind(layer)
    if kind is None:
        raise ValueError(
            "layer: expected a linear layer quantised by bitsandbytes or torchao, or its weight, "
            f"got {type(layer).__module__}.{type(layer).__name__}"
        )
    return {"4bit": _four_bit, "8bit": _eight_bit, "torchao": _torchao}[kind](layer, dtype)


def is_quantised(layer: Any) -> bool:
    """By a library whose weights are no matrices of floats: `tile_source` has something to say."""
    return _kind(layer) is not None


def refusal(layer: Any) -> str | None:
    """Why a quantised layer's words cannot be read; None where they can."""
    try:
        tile_source(layer)
    except RuntimeError as error:
        return str(error)
    return None


def layer_dtype(layer: Any, hidden: Tensor) -> torch.dtype:
    """The dtype a quantised layer multiplies hidden states in."""
    own = getattr(layer, "compute_dtype", None) if _kind(layer) == "4bit" else None
    return own or hidden.dtype


def keeps_dtype(layer: Any) -> bool:
    """Has what it gives the dtype of what it was given, whatever it multiplies in?"""
    return _kind(layer) == "4bit"


def _kind(layer: Any) -> str | None:
    """Without importing any of them: what was made by a library is there with it."""
    bnb, ao = (sys.modules.get(name) for name in ("bitsandbytes.nn", "torchao.utils"))
    weight = layer
    if isinstance(layer, torch.nn.Module):
        weight = layer._parameters.get("weight")  # unread: a parametrization may count readings
    if bnb is not None and isinstance(layer, (bnb.Linear4bit, bnb.Params4bit)):
        return "4bit"
    if bnb is not None and isinstance(layer, (bnb.Linear8bitLt, bnb.Int8Params)):
        return "8bit"
    return "torchao" if ao is not None and isinstance(weight, ao.TorchAOBaseTensor) else None


def _four_bit(layer: Any, dtype: torch.dtype | None) -> TileSource:
    weight = layer if isinstance(layer, Tensor) else layer.weight
    # FSDP takes a parameter's attributes away; the layer remembers.
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        raise RuntimeError("weight: expected one in 4 bits, got one that no device has quantised")
    if getattr(state, "packing_format_for_cpu", False):
        raise RuntimeError("weight: expected blocks of words, got one packed for inference on CPUs")
    out = getattr(layer, "out_features", state.shape[0])
    if len(state.shape) != 2 or out != state.shape[0]:
        raise RuntimeError(f"weight: expected {out} words, got shape {tuple(state.shape)}")
    return FourBit(weight, state, dtype or getattr(layer, "compute_dtype", None) or state.dtype)


def _eight_bit(layer: Any, dtype: torch.dtype | None) -> TileSource:
    weight: Any = layer if isinstance(layer, Tensor) else layer.weight
    state = getattr(layer, "state", None)  # where the layer's first forward puts the scales
    scales = weight.SCB if state is None or state.SCB is None else state.SCB
    if weight.dtype != torch.int8 or scales is None:
        raise RuntimeError(f"weight: expected one in int8 with its scales, got {weight.dtype}")
    return EightBit(weight, scales, dtype or torch.float16)


def _torchao(layer: Any, dtype: torch.dtype | None) -> TileSource:
    weight = layer if isinstance(layer, Tensor) else layer.weight
    kind = type(weight).__name__
    for name in ("act_quant_kwargs", "activation_quantization", "act_pre_scale"):
        if getattr(weight, name, None) is not None:
            raise RuntimeError(f"weight: expected it alone quantised, got a {kind} with {name}")
    parts = all(hasattr(weight, name) for name in ("qdata", "scale", "block_size"))
    if not parts or type(weight).dequantize is Tensor.dequantize:
        raise RuntimeError(f"weight: expected one that can be cut by words, got a {kind}")
    return Subclass(weight, dtype or weight.dtype)

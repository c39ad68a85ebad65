"""What a head multiplies by: its weight, quantised or not, and PEFT adapters as its own terms.

LoRA adds s·dropout(h)·Aᵀ·Bᵀ to the products: r more columns of hidden states and head, joined tile
by tile, and only B's gradient takes a product with the tokens. DoRA rescales every word, so it goes
through the merged weight, a [V, H] copy and its gradient.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..ops.shards.gathered import whole
from ..ops.tiles.known import is_quantised, layer_dtype, refusal, tile_source
from ..ops.tiles.tiled import Tiled, tiled
from ..ops.walks.head import beside
from .seams import hooks
from .seams.calls import beneath

_LORA = (
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
)


def unsupported(head: Any) -> str | None:
    """Why fastpo cannot score through this adapter layer; None when it can."""
    kind = f"{_class(head).__module__}.{_class(head).__name__}"
    if kind not in _LORA:
        return f"an adapter of type {kind}"
    base = head.get_base_layer()
    if not (plain(base) or is_quantised(base)):
        return f"a base layer of type {type(base).__name__}"
    if has_own_forward(base):
        return "a base layer with another forward"
    if is_quantised(base) and (why := refusal(base)) is not None:
        return why
    if hasattr(head.weight, "ds_id"):
        return "an adapter under DeepSpeed ZeRO-3"
    # These layers never run: their weights are read. So are those of lora_A in shards.
    sharded = [x for x in head.lora_A.values() if hasattr(x.weight, "placements")]
    for layer in (base, *head.lora_B.values(), *sharded):
        for hook in hooks.hooks(layer, hooks.FORWARD + hooks.BACKWARD):
            return f"a hook {hooks.name(hook)} on one of its layers"
    for name in head.lora_A:
        variant = head.lora_variant.get(name)
        if variant is not None and type(variant).__name__ != "DoraLinearVariant":
            return f"a LoRA variant {type(variant).__name__}"
        if variant is not None and is_quantised(base):
            return "DoRA on a quantised layer"
        if head.lora_B[name].bias is not None:
            return "lora_bias=True"
    return None


def check_active(head: Any) -> None:
    """RuntimeError where the adapters that are active now have no `operands`."""
    if not is_adapter(head) or head.disable_adapters or head.merged:
        return
    active = [name for name in head.active_adapters if name in head.lora_A]
    dora = [name for name in active if name in head.lora_variant]
    got = None
    if dora and len(active) > 1:
        got = f"DoRA beside other adapters ({', '.join(active)})"
    elif head.training and any(getattr(head.lora_dropout[name], "p", 0.0) > 0 for name in dora):
        got = "DoRA with dropout"
    if got is not None:
        raise RuntimeError(
            f"lm_head: expected one DoRA adapter without dropout, or LoRA adapters, got {got}"
        )


def _class(layer: Any) -> type:
    """Without the one that FSDP2 puts in front."""
    kind = type(layer)
    sharded = any(x.__name__ == "FSDPModule" for x in kind.__mro__)
    return kind.__mro__[2] if sharded else kind


def plain(layer: Any) -> bool:
    """Does it multiply as `torch.nn.Linear` does?"""
    return getattr(type(layer), "forward", None) is torch.nn.Linear.forward


def has_own_forward(layer: Any) -> bool:
    """Was its forward replaced, other than by accelerate, which only moves tensors?"""
    return beneath(layer, "forward") is not None and not hasattr(layer, "_hf_hook")


def is_adapter(head: Any) -> bool:
    """Is this layer one of PEFT's? Where nobody has imported PEFT none is.

    Asked several times a call: looking for a package that is not there would read directories.
    """
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return kind is not None and isinstance(head, kind)


def base_layer(head: Any) -> Any:
    """The linear layer under an adapter, if there is one."""
    return head.get_base_layer() if is_adapter(head) else head


def readable(layer: Any, hidden: Tensor) -> Tensor:  # [V, H]
    """Its weight; of a quantised layer the words tile by tile, for `rounded` hidden states."""
    if not is_quantised(layer):
        weight: Tensor = layer.weight
        return weight
    return tiled(tile_source(layer, layer_dtype(layer, hidden)))


def rounded(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states as the layer of that weight multiplies them: 4-bit layers have a dtype."""
    return hidden.to(weight.dtype) if isinstance(weight, Tiled) else hidden


def operands(
    head: Any,
    hidden: Tensor,  # [N, H]
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The weight [V, H] as the active adapters leave it, and LoRA's (down [N, r], up [V, r])."""
    if not is_adapter(head):
        return readable(head, hidden), None
    check_active(head)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as the layer's own forward does
    base = whole(readable(head.get_base_layer(), hidden))
    if head.disable_adapters or head.merged:
        return base, None
    downs, ups = [], []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant:
            return _dora(head, name, base, hidden), None
        inputs = head.lora_dropout[name](hidden.to(head.lora_A[name].weight.dtype))
        downs.append(_down(head.lora_A[name], inputs) * head.scaling[name])
        ups.append(whole(head.lora_B[name].weight))
    if not downs:
        return base, None
    return base, (beside(*downs), beside(*ups))


def _down(layer: Any, inputs: Tensor) -> Tensor:
    weight = whole(layer.weight)
    # Called where it can be: others may have hooks on it.
    return layer(inputs) if weight is layer.weight else torch.nn.functional.linear(inputs, weight)


def _dora(head: Any, name: str, weight: Tensor, hidden: Tensor) -> Tensor:
    """m·(W + s·B·A) / ‖W + s·B·A‖ by rows, the norm a constant (arXiv:2402.09353, section 4.3)."""
    up, down = (whole(part[name].weight) for part in (head.lora_B, head.lora_A))
    merged = weight.to(up.dtype) + head.scaling[name] * (up @ down)
    magnitude = whole(head.lora_magnitude_vector[name].weight)
    norm = torch.linalg.vector_norm(merged.detach(), dim=1)
    return (merged * (magnitude / norm).unsqueeze(1)).to(hidden.dtype)

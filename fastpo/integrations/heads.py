"""The output embeddings of a model: which layer they are, and what the model does to its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from ..ops.tiles.known import is_quantised, tile_source
from ..ops.walks.checks import DTYPES
from .adapter import base_layer, has_own_forward, is_adapter, plain, unsupported
from .seams import hooks
from .seams.calls import beneath
from .seams.wrappers import uncompiled


def linear_head(model: Any) -> nn.Linear:
    """The head as a linear layer, perhaps quantised, perhaps with LoRA.

    Read at each call: PEFT may come later.
    """
    around = head = output_layer(model)
    if head is not None and "modules_to_save" in head._modules:  # PEFT trains a copy of it whole
        chosen = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[chosen[0]] if chosen else head.original_module
    foreign = has_own_forward(head) and not tensor_parallel(head)
    if not foreign and is_adapter(head):
        reason = unsupported(head)
        if reason is not None:
            raise RuntimeError(f"{type(model).__name__}: expected a head of LoRA, got {reason}")
    elif foreign or not (plain(head) or is_quantised(head)):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        got = "none" if head is None else f"{kind} with another forward" if foreign else kind
        raise RuntimeError(
            f"{type(model).__name__}.get_output_embeddings(): expected a torch.nn.Linear, or "
            f"bitsandbytes' own, got {got}"
        )
    for layer in (model.get_output_embeddings(), around, head):
        for hook in hooks.hooks(layer, hooks.BACKWARD):
            raise RuntimeError(
                f"lm_head: expected no backward hook, got {hooks.name(hook)}: there are no logits "
                "whose gradient it could be given"
            )
        if hooks.splits(layer):
            raise RuntimeError("lm_head: expected none of torch's parallelize_module, got one")
    in_all_shards(model, head)
    weight = stored_weight(head)
    if weight.device.type == "meta":
        raise RuntimeError("lm_head.weight: expected a tensor in memory, got an offloaded one")
    if isinstance(weight, DTensor):
        _check_mean(model, weight)
    layer = base_layer(head)
    if is_quantised(layer):
        tile_source(layer)  # or says why not
    elif weight.dtype not in DTYPES:
        raise RuntimeError(
            f"lm_head.weight: expected dtype float32, bfloat16 or float16, got {weight.dtype}"
        )
    return head


def output_layer(model: Any) -> Any:
    """`get_output_embeddings()` without a compiler's wrapper; None where there is none."""
    read = getattr(model, "get_output_embeddings", None)  # a wrapper of a script's may have none
    return None if read is None else uncompiled(read())


def in_all_shards(model: Any, head: Any) -> None:
    """With a number for `reshard_after_forward` FSDP2 shows a parameter in fewer shards between
    forward and backward, and reads no gradient of it: one that is read there would be lost."""
    shown = {id(x) for x in head.parameters() if isinstance(x, DTensor)}
    for group in _groups(model) if shown else ():
        fewer = group.is_sharded_post_forward
        if fewer and any(id(x._sharded_post_forward_param) in shown for x in group.fsdp_params):
            group.reshard()


def _check_mean(model: Any, weight: DTensor) -> None:
    """A head that is read in its shards of FSDP2 gets the mean of all processes' gradients."""
    for group in _groups(model):
        own = any(one.sharded_param is weight for one in group.fsdp_params)
        factor = group.gradient_divide_factor
        if own and factor not in (None, weight.device_mesh.size()):
            raise RuntimeError(
                "set_gradient_divide_factor: expected none for the lm_head, whose gradient is "
                f"the mean of the processes', got {factor}"
            )


def _groups(model: Any) -> Iterator[Any]:
    """FSDP2's groups of parameters."""
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from filter(None, groups)


def stored_weight(head: Any) -> Tensor:
    """The weight, or what it is made of: a parametrization makes it anew whenever it is read."""
    layer = base_layer(head)
    if parametrize.is_parametrized(layer, "weight"):
        return next(layer.parametrizations["weight"].parameters())
    weight: Tensor = layer.weight
    return weight


def words_of(head: Any) -> int:
    """How many the weight has: what a layer says of itself stays as it was where another weight has
    been put into it, and of PEFT's copy of tied embeddings it is the width."""
    layer = base_layer(head)
    weight = layer._parameters.get("weight")  # not of a parametrized one; of ZeRO-3 without shape
    own = weight is not None and weight.dim() == 2 and not is_quantised(layer)
    return int(len(weight) if own else layer.out_features)


def tensor_parallel(head: Any) -> bool:
    """Whether transformers shares the words out to processes that all have the same tokens."""
    own = getattr(beneath(head, "forward"), "__module__", "")
    return own == "transformers.distributed.tensor_parallel" and isinstance(head.weight, DTensor)


def logit_map(config: Any) -> tuple[float | None, float]:
    """Soft-cap and factor of the logits, by the names the model families give them."""
    config = config.get_text_config()
    # Gemma; RecurrentGemma; xLSTM
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    caps = (getattr(config, name, None) for name in names)
    softcap = next((cap for cap in caps if cap is not None), None)
    # Cohere; Muse Glimmer; Falcon-H1
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return softcap, float(factor)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if divisor is None or config.model_type == "minicpm3":  # which divides its hidden states
        return softcap, 1.0
    return softcap, float(divisor if config.model_type == "hyperclovax" else 1 / divisor)

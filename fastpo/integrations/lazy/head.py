"""A model's head that answers with a promise of logits, for the length of one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from ...ops.shards.gathered import HeadOptions, whole
from ...ops.walks.checks import DTYPES
from ...ops.walks.derivatives import transform
from ...ops.walks.saving import checkpointed, saving_hooks
from ..adapter import base_layer, check_active, is_adapter
from ..heads import linear_head, stored_weight, tensor_parallel
from ..seams.calls import answered, standing_in, unhidden
from ..seams.saying import say_once
from .logits import promised
from .promise import OWN, Promise


@contextmanager
def lazy_head(
    who: str, model: Any, options: HeadOptions = OWN, shards: bool = False
) -> Iterator[None]:
    """The model's head answers with `LazyLogits`; a head fastpo does not know stays itself.

    who: whose full logits are kept then, for the log.
    shards: a head in shards stays in them, because all processes read the same of its logits.
    """
    try:
        head: Any = linear_head(model)
        parts, own_tokens = _readable(head, shards), not tensor_parallel(head)
    except RuntimeError as error:
        say_once(f"{who} keeps its full logits", str(error))
        yield
        return
    if answered(head, "forward"):  # by a call around this one
        yield
        return
    own, sharded = unhidden(head.forward), isinstance(parts[0], DTensor)
    outside = saving_hooks()

    def forward(hidden: Tensor, **given: Any) -> Tensor:
        # A checkpoint that began in here computes again when nothing stands in any more.
        again = checkpointed() and saving_hooks() != outside
        unread = hidden.dtype not in DTYPES or any(map(_watched, (hidden, *head.parameters())))
        if given:  # PEFT's adapter_names: rows of several heads
            say_once(f"{who} keeps its full logits", f"its head is given {', '.join(given)}")
        if again or unread or given:
            made: Tensor = own(hidden, **given)
            return made
        if not sharded:
            return promised(Promise.of(head, hidden, options))
        # Not the weight FSDP2 has gathered for this forward: it is gone when logits are asked for.
        # In mixed precision FSDP2, too, gathers 16 bits.
        found = tuple(None if x is None else x.to(hidden.dtype) for x in parts)
        if not shards:
            # Gathered here: every process calls the head, not every one has labels to score.
            found = tuple(None if x is None else whole(x) for x in found)
        return promised(Promise.of(head, hidden, options, found, own_tokens))

    with standing_in(head, "forward", forward):
        yield


def _watched(x: Tensor) -> bool:
    """Inside torch.func and forward-mode AD logits are asked for derivatives of every kind; whoever
    traces, or runs a model on tensors that hold nothing, wants its own operations."""
    traced = torch.jit.is_tracing() or isinstance(x, FakeTensor)
    return traced or transform(x) is not None


def _readable(head: Any, shards: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias between two forwards; RuntimeError where they cannot be read after one.

    Of a parametrized head what the weight is made from: each reading of itself makes it anew.
    """
    check_active(head)
    weight = stored_weight(head)
    if tensor_parallel(head) and not shards:
        raise RuntimeError("lm_head.weight: expected a whole tensor, got a tensor-parallel shard")
    if hasattr(weight, "ds_id"):
        raise RuntimeError("lm_head.weight: expected a whole tensor, got a shard of ZeRO-3")
    if _of_fsdp1(head):
        raise RuntimeError("lm_head.weight: expected a whole tensor, got a shard of FSDP1")
    if isinstance(weight, DTensor):
        if is_adapter(head):
            raise RuntimeError("lm_head.weight: expected no adapter on a shard, got one")
        weight = head.weight
    return weight, head.bias


def _of_fsdp1(head: Any) -> bool:
    """Both mark their modules. FSDP1 flattens a weight, and in a forward has a view in its place;
    FSDP2's is a parameter."""
    layer = base_layer(head)
    if not getattr(layer, "_is_fsdp_managed_module", False):
        return False
    return not isinstance(layer.weight, nn.Parameter) or layer.weight.ndim != 2

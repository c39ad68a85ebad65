"""Models in shards on a machine without accelerators."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import DistributedType, PartialState
from torch import Tensor


def shard_on_a_cpu() -> None:
    """accelerate shards on accelerators only: for it the CPU of this process is one of several."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    gather = getattr(parameter, "full_tensor", parameter.detach)
    return gather().detach().clone()

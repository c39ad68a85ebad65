"""A base model in 4 bits, as bitsandbytes keeps it for QLoRA: NF4, its scales quantised, too.

Two numbers a byte, a byte of scale for 64 of them, a float32 for 256 of those, and two tables. For
a product the weight exists as long as that takes, in the dtype that it had before.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_BLOCK, _SECOND = 64, 256
_TABLES = 16 + 256 + 1


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Any, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        with torch.autocast(x.device.type, enabled=False):  # of which a kernel does not know
            return F.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        assert ctx.saved_tensors
        return grad @ grad.new_empty(ctx.shape), None, None, None


class Packed(nn.Linear):
    """The bytes of `bitsandbytes.nn.Linear4bit`, without its numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        cells, device = linear.weight.numel(), linear.weight.device
        packed = torch.empty(-(-cells // 2), 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias, self.compute_dtype = linear.bias, linear.weight.dtype
        blocks = -(-cells // _BLOCK)
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8, device=device))
        second = torch.empty(-(-blocks // _SECOND) + _TABLES, dtype=torch.float32, device=device)
        self.register_buffer("second", second)

    def forward(self, x: Tensor) -> Tensor:
        shape, dtype = (self.out_features, self.in_features), self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        found: Tensor = _Product.apply(x.to(dtype), self.weight, bias, shape)
        return found.to(x.dtype).clone()  # as PEFT does with what 4 bits gave


def quantise(model: Any) -> None:
    """All linear layers but the head, as transformers has it; real ones by bitsandbytes."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, _packed(_turned(child)))
            elif type(child) is nn.Linear and child is not head:
                setattr(parent, name, _packed(child))


def _turned(module: Conv1D) -> nn.Linear:
    """GPT-2's layers have their weight the other way round."""
    inputs, outputs = module.weight.shape
    made = nn.Linear(inputs, outputs, device="meta")
    made.weight, made.bias = nn.Parameter(module.weight.detach().t().contiguous()), module.bias
    return made


def library() -> Any:
    """ValueError where there is none."""
    try:
        return import_module("bitsandbytes.nn")
    except ImportError as error:
        raise ValueError("measure: expected bitsandbytes for 4 bits, got none") from error


def _packed(linear: nn.Linear) -> nn.Linear:
    if linear.weight.device.type == "meta":
        return Packed(linear)
    bnb = library()
    options = {"compress_statistics": True, "quant_type": "nf4"}
    bias = linear.bias is not None
    made = bnb.Linear4bit(
        linear.in_features, linear.out_features, bias, linear.weight.dtype, device="meta", **options
    )
    weight = bnb.Params4bit(linear.weight.detach(), requires_grad=False, **options)
    made.weight, made.bias = weight.to(linear.weight.device), linear.bias
    found: nn.Linear = made
    return found

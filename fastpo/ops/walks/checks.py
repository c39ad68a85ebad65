"""What every primitive asks of its arguments, before the first kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUTS = ("logps", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "lse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype eager products would run in here."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    check_whole(hidden=hidden, weight=weight, labels=labels, bias=bias)
    if hidden.dim() < 1:
        raise ValueError("hidden: expected shape (..., H), got ()")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[-1]}), got {shape_of(weight)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {shape_of(hidden)[:-1]}, got {shape_of(labels)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    tensors = {"hidden": hidden, "weight": weight}
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {shape_of(bias)}")
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected dtype float32, bfloat16 or float16, got {tensor.dtype}"
            )
    for name, tensor in {**tensors, "labels": labels}.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {tensor.device}")


def check_whole(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        # By attribute: torch.distributed takes half a second to import.
        if tensor is not None and hasattr(tensor, "placements"):
            raise ValueError(f"{name}: expected a whole tensor, got DTensor {tensor.placements}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_options(
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
    budget: int | None,
) -> None:
    finite = float("inf")
    if not 0 < temperature < finite:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    if softcap is not None and not 0 < softcap < finite:
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap}")
    if not -finite < logit_scale < finite:
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale}")
    if budget is not None and budget < 0:
        raise ValueError(f"budget: expected bytes >= 0 or None, got {budget}")
    if not isinstance(outputs, tuple | list) or not outputs or set(outputs) - set(OUTPUTS):
        raise ValueError(f"outputs: expected a tuple of {', '.join(OUTPUTS)}, got {outputs!r}")

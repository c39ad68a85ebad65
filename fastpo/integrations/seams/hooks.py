"""Hooks that other people have put on a layer, or on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.modules import module as every

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")


def hooks(layer: Any, kinds: tuple[str, ...]) -> list[Callable[..., Any]]:
    """All but FSDP2's, which show and hide weights and change nothing."""
    found = [hook for held in _held(layer, kinds) for hook in held.values()]
    return [x for x in found if not getattr(x, "__module__", "").startswith("torch.distributed.")]


def splits(layer: Any) -> bool:
    """Do hooks of torch's `parallelize_module` make DTensors of what goes through it?"""
    found = [hook for held in _held(layer, FORWARD) for hook in held.values()]
    return any(getattr(x, "__module__", "").startswith("torch.distributed.tensor") for x in found)


def numbers(layer: Any) -> tuple[int, ...]:
    """One for each forward hook, none given twice."""
    return own_numbers(layer) + global_numbers()


def own_numbers(layer: Any) -> tuple[int, ...]:
    return tuple(number for kind in FORWARD for number in getattr(layer, kind))


def global_numbers() -> tuple[int, ...]:
    return tuple(number for kind in FORWARD for number in getattr(every, f"_global{kind}"))


def name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _held(layer: Any, kinds: tuple[str, ...]) -> list[dict[int, Callable[..., Any]]]:
    own = [getattr(layer, kind) for kind in kinds]
    return own + [getattr(every, f"_global{kind}") for kind in kinds]

"""Tensors of another device that are said to be on a GPU: for tests where there is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
_HOPPER = SimpleNamespace(
    multi_processor_count=132, total_memory=80 * 2**30, L2_cache_size=50 * 2**20
)


class AsGpu(TorchFunctionMode):
    """Says `device` where the test says cuda, and the other way round where it asks."""

    device: torch.device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) or "autocast" in getattr(func, "__name__", ""):
            return func(*args, **kwargs)  # names of backends, a question about CUDA itself
        args, kwargs = tree_map(self._moved, (args, kwargs))
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        result = self.call(func, args, kwargs)
        return GPU if isinstance(result, torch.device) and result == self.device else result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _moved(self, x: Any) -> Any:
        cuda = isinstance(x, str | torch.device) and str(x).partition(":")[0] == "cuda"
        return self.device if cuda else x


class _Generator(torch.Generator):
    """Of any device; the GPU's numbers are drawn nowhere."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls)


def nothing(*_: Any, **__: Any) -> None:
    return None


def pretend(capability: tuple[int, int] = (9, 0), **more: Callable[..., Any]) -> None:
    """Before anyone asks for a GPU, and for good. `more`: of torch.cuda, by name."""
    functions = {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "a pretended GPU",
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: _HOPPER,
        "current_stream": lambda *_: SimpleNamespace(device_index=0, cuda_stream=0),
        "device": lambda *_: nullcontext(),
        "device_of": lambda *_: nullcontext(),
        "synchronize": nothing,
        "set_sync_debug_mode": nothing,
    }
    for name, function in (functions | more).items():
        setattr(torch.cuda, name, function)
    torch.Generator = _Generator
    # PyTorch leaves the mode where it calls what may be overridden, the backward among it.
    torch.autograd.has_torch_function = lambda _: False
    torch._tensor.has_torch_function_unary = lambda _: False


def inside(mode: Callable[[], AbstractContextManager[Any]], function: Any) -> Callable[..., Any]:
    """An operator's code, because PyTorch leaves a mode where it calls one."""

    def run(*args: Any) -> Any:
        with mode():
            return function(*args)

    return run

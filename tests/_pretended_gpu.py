"""`pytest -p _pretended_gpu -m gpu`: tests for a GPU, run without one as far as that goes.

Tensors of the GPU have a device, a dtype and a shape, and no values: they are PyTorch's meta
tensors, which mix with a host's as badly as CUDA ones. Kernels are not launched. A test ends where
it asks for a value; until then whatever it imports, calls or puts on the wrong device fails as it
would on a GPU, and so does a copy from the host inside a guard against waiting.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import _as_gpu
import pytest
import torch
import triton
from _as_gpu import AsGpu, inside, nothing, pretend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpo._C

META = torch.device("meta")
_LIBRARY = (Path(fastpo.__file__).parent, Path(__file__).parents[1] / "kernels")
# The comparison rule, and the one place that reads what was logged.
_MAY_ASK = (
    _LIBRARY[0] / "testing.py",
    _LIBRARY[0] / "integrations" / "trl" / "metrics" / "ledger.py",
)
# How PyTorch says that a meta tensor has no values.
_NO_VALUE = ("on meta tensors", "out of meta tensor", "with Meta tensors")
# What copies where tensors of both sides meet, and what copies numbers of Python's.
_aten = torch.ops.aten
_COPIES = (
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
)
_FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
_guarded = False


class _OnMeta(AsGpu):
    device = META

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("device") == META:
            kwargs.pop("generator", None)
        result = func(*args, **kwargs)
        if _guarded and func in _FROM_PYTHON and result.device == META:
            raise AssertionError(f"{func.__name__}: a copy from the host inside a guard")
        return result


class _NoHostCopies(TorchDispatchMode):
    """A copy between host and device waits, unless it is told not to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inside an operator `to` arrives whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if _guarded and func in _COPIES:
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            told = func is _aten.copy_.default and args[2:] == (True,)
            waits = not (told or kwargs.get("non_blocking"))
            if waits and len({x.device for x in tensors}) > 1:
                raise AssertionError(f"{func}: a copy between host and device inside a guard")
        return result


def _guard(mode: str) -> None:
    global _guarded
    _guarded = mode == "error"


_NATIVE = {"has_cuda": True, "has_cutlass": True} | dict.fromkeys(
    ("AnchoredTile", "anchored_cuda", "rows_forward_cuda", "rows_backward_cuda"), nothing
)


pretend(set_sync_debug_mode=_guard)
for _name, _value in _NATIVE.items():
    setattr(fastpo._C, _name, _value)
triton.runtime.JITFunction.run = nothing


@contextmanager
def without_values() -> Iterator[None]:
    """Tensors of the GPU made here have none."""
    with _NoHostCopies(), _OnMeta():
        yield


def run_operators(mode: Callable[[], AbstractContextManager[None]]) -> None:
    """On meta tensors operators run their own code, not the shapes that stand in for it."""
    _ = fastpo.linear_logps, fastpo.linear_divergence  # imported where first asked for
    for operator in torch._library.custom_ops.OPDEFS.values():
        if operator._namespace == "fastpo":
            operator._abstract_fn = inside(mode, operator._init_fn)


def pytest_collection_finish() -> None:
    run_operators(without_values)


@pytest.fixture(autouse=True)
def tensors_without_values() -> Iterator[None]:
    with without_values():
        yield
    _guard("default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except (RuntimeError, NotImplementedError) as error:
        if not any(words in str(error) for words in _NO_VALUE) or not _a_test_asks(error):
            raise
        return None


def _a_test_asks(error: Exception) -> bool:
    """The library itself may not: on a GPU it would wait."""
    torch_itself, ours = Path(torch.__file__).parent, (Path(__file__), Path(_as_gpu.__file__))
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    asking = [x for x in files if x not in ours and not x.is_relative_to(torch_itself)][-1]
    return asking in _MAY_ASK or not any(map(asking.is_relative_to, _LIBRARY))

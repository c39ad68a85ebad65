"""A GPU in this process: tensors of the host that are said to be on it, and kernels in PTX.

Before fastpo is imported, and for good.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TRITON_INTERPRET"] = "0"

import _driver
import _runtime
import torch
from _as_gpu import AsGpu, inside, pretend
from _machine import Manner

# Few, so that a persistent kernel has several blocks.
_PROPERTIES = SimpleNamespace(multi_processor_count=4, total_memory=80 * 2**30, L2_cache_size=2**20)


class OnHost(AsGpu):
    device = torch.device("cpu")

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in (torch.mm, torch.addmm) and kwargs.get("out_dtype") is torch.float32:
            kwargs = {name: value for name, value in kwargs.items() if name != "out_dtype"}
            args = [x.float() for x in args]
        return func(*args, **kwargs)


class Emulated(NamedTuple):
    manner: Manner
    driver: _driver.Driver
    runtime: _runtime.Runtime | None

    def launches(self) -> list[str]:
        """Names of all kernels that were run."""
        both = self.driver.launches + (self.runtime.launches if self.runtime else [])
        return [name for name, _ in both]

    def mode(self) -> AbstractContextManager[Any]:
        return OnHost()


def emulate(cache: Path, capability: int = 90, extension: Path | None = None) -> Emulated:
    """`cache`: where Triton may write; `extension`: of _extension.py, or fastpo's own."""
    pretend(divmod(capability, 10), get_device_properties=lambda *_: _PROPERTIES)
    manner = Manner(allowed=tensors)
    driver, runtime = _driver.install(cache, capability, manner), None
    if extension is not None:
        runtime = _runtime.Runtime(extension.with_name("cudart.so"), manner)
        sys.modules["fastpo._C"] = _runtime.extension(extension)
    import fastpo.ops

    if extension is not None:
        fastpo._C = sys.modules["fastpo._C"]
    for module in pkgutil.walk_packages(fastpo.ops.__path__, "fastpo.ops."):
        importlib.import_module(module.name)
    for operator in torch._library.custom_ops.OPDEFS.values():
        if operator._namespace == "fastpo":
            for device in operator._backend_fns:
                operator._backend_fns[device] = inside(OnHost, operator._init_fn)
    gc.freeze()  # what is there by now is no tensor that a kernel is given
    return Emulated(manner, driver, runtime)


_early: list[tuple[int, int]] = []


def remember_tensors() -> None:
    """Those there are: modules' own, which `gc.freeze` would hide."""
    _early.extend(tensors())


def tensors() -> list[tuple[int, int]]:
    """Memory of all there are: elsewhere a kernel may not read or write."""
    with torch._C.DisableTorchFunction():
        storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        found = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages if x.nbytes()]
        return _early + found

"""Triton's driver for a Hopper GPU that is not there: its kernels' PTX runs on the machine here."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from _machine import Launch, Machine, Manner, Size
from _runtime import parsed
from _tensor_map import TensorMap
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

_SHARED_MEMORY = 232_448  # bytes a block may have
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H",
    "u32": "I", "u64": "Q", "fp16": "e", "fp32": "f", "fp64": "d",
}  # fmt: skip


class Compiled(NamedTuple):
    text: str
    name: str
    shared: int


class Driver(DriverBase):
    def __init__(self, cache: Path, capability: int, manner: Manner) -> None:
        self.capability, self.manner = capability, manner
        self.launches: list[tuple[str, Launch]] = []
        self.utils = SimpleNamespace(
            load_binary=_loaded,
            get_device_properties=lambda _: {"max_shared_mem": _SHARED_MEMORY},
        )
        self.launcher_cls = lambda source, metadata: _Launcher(self, source, metadata)
        # What stands for machine code is PTX, which no cache of Triton's may mix up.
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        CUDABackend.make_cubin = lambda self, text, *_: text.encode()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError(ty)

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("nothing is timed here")


def _loaded(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
    found = Compiled(binary.decode(), name, shared)
    return found, found, 0, 0, 1024


class _Launcher:
    def __init__(self, driver: Driver, source: Any, metadata: Any) -> None:
        self.driver, self.metadata = driver, metadata
        self.types = list(source.signature.values())

    def __call__(
        self, x: int, y: int, z: int, stream: int, compiled: Compiled, packed: Any, *rest: Any
    ) -> None:
        arguments = rest[3:]  # behind metadata and hooks
        if self.metadata.num_ctas != 1 or self.metadata.global_scratch_size:
            raise NotImplementedError("clusters, or memory beside the kernel's own")
        module = parsed(compiled.text)
        values = self.encoded(arguments)
        values += [bytes(8)] * (len(module.kernels[compiled.name].parameters) - len(values))
        launch = Launch(Size(x, y, z), 32 * self.metadata.num_warps, compiled.shared)
        self.driver.launches.append((compiled.name, launch))
        Machine(module, compiled.name, launch, values, self.driver.manner).run()

    def encoded(self, arguments: tuple[Any, ...]) -> list[bytes]:
        values, maps = [], iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        for kind, value in zip(self.types, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                values += _described(value, next(maps))
            elif kind.startswith("*"):
                values.append(struct.pack("Q", 0 if value is None else value.data_ptr()))
            else:
                values.append(struct.pack(_FORMATS[kind], value))
        return values


def _described(value: Any, given: dict[str, Any]) -> list[bytes]:
    """The map, and sizes and strides once more."""
    itemsize = value.base.element_size()
    tensor = TensorMap(
        value.base.data_ptr(),
        tuple(reversed(value.shape)),
        tuple(stride * itemsize for stride in reversed(value.strides[:-1])),
        tuple(reversed(given["block_size"])),
        itemsize,
        given["swizzle"],
    )
    if problem := tensor.problem():
        raise ValueError(f"{problem}: {tensor}")
    sizes = [struct.pack("i", x) for x in value.shape]
    return [tensor.encoded(), *sizes, *(struct.pack("q", x) for x in value.strides)]


def install(cache: Path, capability: int, manner: Manner) -> Driver:
    driver = Driver(cache, capability, manner)
    triton.runtime.driver.set_active(driver)
    return driver

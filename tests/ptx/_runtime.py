"""fastpo's extension with its CUDA kernels, which the machine of this folder runs."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from _machine import Launch, Machine, Manner, Size
from _tensor_map import TensorMap
from _text import Module, parse

_TWO_BYTES = (1, 6, 9)  # CUtensorMapDataType: uint16, float16, bfloat16
_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
_ON_TENSOR = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint), ctypes.c_int,
)  # fmt: skip

parsed = functools.cache(parse)


class Runtime:
    """What kernels are run with; the last error, of which CUDA only says that there was one."""

    def __init__(self, stand_in: Path, manner: Manner) -> None:
        self.manner = manner
        self.launches: list[tuple[str, Launch]] = []
        self.error: Exception | None = None
        library = ctypes.CDLL(str(stand_in), mode=ctypes.RTLD_GLOBAL)
        self._kept = (_ON_LAUNCH(self._guarded(self._launch)), _ON_TENSOR(self._guarded(_encode)))
        library.fastpo_listen(*self._kept)

    def _guarded(self, function: Callable[..., None]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            try:
                function(*arguments)
            except Exception as error:
                self.error = error
                return 1
            return 0

        return call

    def _launch(self, ptx: bytes, kernel: bytes, sizes: Any, shared: int, arguments: Any) -> None:
        module: Module = parsed(ptx.decode())
        name = kernel.decode()
        values = [
            ctypes.string_at(arguments[i], parameter.size)
            for i, parameter in enumerate(module.kernels[name].parameters)
        ]
        grid, block, cluster = (Size(*sizes[i : i + 3]) for i in (0, 3, 6))
        launch = Launch(grid, block.count, shared, cluster)
        self.launches.append((name, launch))
        Machine(module, name, launch, values, self.manner).run()


def _encode(
    out: int, kind: int, rank: int, address: int, sizes: Any, pitches: Any, box: Any, swizzle: int
) -> None:
    if kind not in _TWO_BYTES:
        raise NotImplementedError(f"a tensor map of type {kind}")
    given = TensorMap(
        address, tuple(sizes[:rank]), tuple(pitches[: rank - 1]), tuple(box[:rank]), 2, swizzle
    )
    if problem := given.problem():
        raise ValueError(f"{problem}: {given}")
    ctypes.memmove(out, given.encoded(), 128)


def extension(path: Path) -> ModuleType:
    """In place of fastpo._C, which must not have been imported: pybind11 knows a class once."""
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""The backends by name, and which of them serve a device."""

from __future__ import annotations

import torch

from . import anchored_cutlass, cpu, cuda, triton
from . import torch as eager
from .backend import RowKernels
from .pair import cpu as pair_cpu
from .pair import torch as pair_eager
from .pair import triton as pair_triton
from .pair.backend import PairKernels
from .words import cpu as words_cpu
from .words import torch as words_eager
from .words import triton as words_triton
from .words.backend import WordKernels

_KERNELS: dict[str, RowKernels] = {
    "cuda": cuda,
    "triton": triton,
    # Their own forward where that serves (see walks/anchored.py); else all of Triton's.
    "anchored": triton,
    "cutlass": triton,
    "cpu": cpu,
    "torch": eager,
}
_PAIR_KERNELS: dict[str, PairKernels] = {
    "cuda": pair_eager,  # the compiled CUDA rows are those of one head only
    "triton": pair_triton,
    "anchored": pair_triton,
    "cutlass": pair_triton,
    "cpu": pair_cpu,
    "torch": pair_eager,
}
_WORD_KERNELS: dict[str, WordKernels] = {
    "cuda": words_triton,  # there are no compiled CUDA kernels of these
    "triton": words_triton,
    "anchored": words_triton,
    "cutlass": words_triton,
    "cpu": words_cpu,
    "torch": words_eager,
}
BACKENDS = tuple(_KERNELS)


def kernels(backend: str) -> RowKernels:
    return _KERNELS[backend]


def pair_kernels(backend: str) -> PairKernels:
    return _PAIR_KERNELS[backend]


def word_kernels(backend: str) -> WordKernels:
    if backend == "cuda" and not triton.is_installed():
        return words_eager
    return _WORD_KERNELS[backend]


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend of BACKENDS cannot serve the device; None when it can."""
    own = anchored_cutlass.unavailable(device) if backend == "cutlass" else None
    return own or kernels(backend).unavailable(device)


def check(backend: str | None) -> None:
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def choose(backend: str | None, device: torch.device) -> str:
    """The named backend, or the best that serves the device."""
    check(backend)
    if backend is None:
        preference = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
        for name in preference.get(device.type, ()):
            if unavailable(name, device) is None:
                return name
        return "torch"
    reason = unavailable(backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r}: {reason}")
    return backend

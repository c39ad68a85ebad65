"""`pytest -p _emulated_gpu`: tests for a GPU, run without one and with values, slowly.

FASTPO_EXTENSION names the extension with CUDA kernels that tests/kernels/_nvcc.py builds;
FASTPO_CAPABILITY is 90, or 80.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from _gpu import emulate, remember_tensors

_cache = tempfile.TemporaryDirectory()
_extension = os.environ.get("FASTPO_EXTENSION")
_gpu = emulate(
    Path(_cache.name),
    int(os.environ.get("FASTPO_CAPABILITY", "90")),
    Path(_extension) if _extension else None,
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish() -> None:
    remember_tensors()


@pytest.fixture(autouse=True)
def tensors_of_the_host() -> Iterator[None]:
    with _gpu.mode():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What stopped a kernel says more than that one was stopped."""
    try:
        return (yield)
    except RuntimeError as error:
        if _gpu.runtime is not None and _gpu.runtime.error is not None:
            raise _gpu.runtime.error from error
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    names = _gpu.launches()
    counts = {name[-60:]: names.count(name) for name in sorted(set(names))}
    terminalreporter.write_line(f"kernels on the emulated GPU: {counts}")

"""What tests watch while something runs: sizes of tensors, products, calls, one thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpo.ops.walks import forward as driver
from fastpo.ops.walks.forward import HeadSpec

# Of torch.compile: it compares what each operator promised, strides too, with what came out.
COMPARING = "aot_eager_decomp_partition_crossref"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Import it into a test module: on a busy machine two threads made a tiny step 100x slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Widest(TorchDispatchMode):
    """The largest number of elements any operator returned, of the tensors that count."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in [result] if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.numel() > self.elements and self.counts(x):
                self.elements = x.numel()
        return result

    def counts(self, x: torch.Tensor) -> bool:
        return True


class Products(TorchDispatchMode):
    """Counts multiplications of the matrix products in its block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def count_calls(monkeypatch: Any) -> list[HeadSpec]:
    """From here on, one entry for each run of the primitive."""
    calls: list[HeadSpec] = []
    forward = driver.forward

    def counted(hidden: Any, weight: Any, bias: Any, labels: Any, spec: HeadSpec) -> Any:
        calls.append(spec)
        return forward(hidden, weight, bias, labels, spec)

    monkeypatch.setattr(driver, "forward", counted)
    return calls

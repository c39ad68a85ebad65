"""Shared fixtures: Triton's interpreter where there is no GPU, and memory that starts as NaN."""

import gc
import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# A few examples, the same each time; `make fuzz` asks for the other profile and prints its seed.
settings.register_profile("default", max_examples=25, derandomize=True, deadline=None)
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1000")),
    deadline=None,
    print_blob=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Up to torch 2.8 its products are no deterministic ones without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Before the first import of triton: the decorator reads it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

    if find_spec("triton") is not None:
        from triton.runtime import interpreter
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def fma(self, x, y, z):
            """Rounds once, as a GPU does; Triton's own rounds the product, too."""
            exact = x.data.astype("float64") * y.data + z.data
            return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        def dot(self, a, b, total, *options):
            """A row has the same bits wherever it stands, as on a GPU; not so by numpy's BLAS."""
            exact = a.data.astype("float64") @ b.data.astype("float64") + total.data
            return TensorHandle(exact.astype(total.data.dtype), total.dtype.scalar)

        InterpreterBuilder.create_fma = fma
        InterpreterBuilder.create_dot = dot

        patched = set()  # namespaces of functions, since the kernel's start

        def launch(self, *args, launched=interpreter.GridExecutor.__call__, **kwargs):
            patched.clear()
            return launched(self, *args, **kwargs)

        def call(self, *args, **kwargs):
            """Triton's looks through its language at every call in a kernel: half of all time."""
            if id(self.fn.__globals__) not in patched:
                interpreter._patch_lang(self.fn)
                patched.add(id(self.fn.__globals__))
            return self.rewrite()(*args, **kwargs)

        interpreter.GridExecutor.__call__ = launch
        interpreter.InterpretedFunction.__call__ = call


def pytest_collection_finish():
    """Imports stay: a trainer collects garbage at its start, a third of a test's time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Deterministic mode fills torch.empty with NaN: an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def library_products(monkeypatch):
    """On every processor; a test that counts products sees those of PyTorch alone."""
    from fastpo.ops import products

    monkeypatch.setattr(products, "own_dtypes", frozenset)


@pytest.fixture
def mesh():
    """A process group and a mesh of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone, for all tests of a file."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def defaults():
    """Changes PyTorch's default dtype and device; without a dtype, back."""
    dtype = torch.get_default_dtype()

    def change(to: torch.dtype | None = None) -> None:
        torch.set_default_dtype(dtype if to is None else to)
        # A device by name, were it the CPU, would stay as a mode around every later call.
        torch.set_default_device(None if to is None else "meta")

    yield change
    change()

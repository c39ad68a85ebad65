"""Shared fixtures: Triton's interpreter where there is no GPU, and memory that starts as NaN."""

import os

import pytest
import torch

# Before the first import of triton: the decorator reads it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Deterministic mode fills torch.empty with NaN: an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def mesh():
    """A process group and a mesh of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()

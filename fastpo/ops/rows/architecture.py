"""What a GPU has to be for our device code, asked here and nowhere else."""

from __future__ import annotations

import torch

# The kernels' NaN-keeping maximum and their bfloat16 conversions are instructions of sm_80, and
# csrc/cuda is built for nothing older (see cuda.cmake).
_LEAST = (8, 0)


def too_old(device: torch.device) -> str | None:
    """Why code for sm_80 cannot run on a CUDA device; None when it can."""
    if not torch.cuda.is_available():
        return "no CUDA device is there"
    if torch.version.hip is not None:  # AMD's numbers count something else
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= _LEAST:
        return None
    return f"needs compute capability 8.0 or newer, got {major}.{minor}"


def is_hopper(device: torch.device) -> bool:
    """Whether code for sm_90a runs there, which runs nowhere else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)

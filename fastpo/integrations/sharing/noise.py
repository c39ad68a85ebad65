"""Whether a forward draws random numbers: the generators of its device have moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def states(device: torch.device) -> list[Tensor]:
    """Of the host's generator and of the device's, if it has one."""
    found = [torch.get_rng_state()]
    if device.type == "mps":
        found.append(torch.mps.get_rng_state())
    elif _has_own(device):
        found.append(torch.get_device_module(device).get_rng_state(device))
    return found


def moved(before: list[Tensor], device: torch.device) -> bool:
    return not all(map(torch.equal, before, states(device)))


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """The generators behind this block are where they were before it."""
    own = _has_own(device)
    with torch.random.fork_rng([device] if own else [], device_type=device.type if own else "cpu"):
        yield


def _has_own(device: torch.device) -> bool:
    return hasattr(getattr(torch, device.type, None), "default_generators")

"""Not written yet: its owner replaces this file."""

import torch


def unavailable(device: torch.device) -> str | None:
    return "not written yet"

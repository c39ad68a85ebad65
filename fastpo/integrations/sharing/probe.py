"""On the first call of a model: does it compute the same packed as padded?

Names and flags do not tell of every model what its layers look at. Two rows with half in common and
one with pads on its left go through it both ways, without gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...layout.tree import layout_of
from .attention import Refused

_LIMIT = 1e-3  # right models differ by 2e-6 in float32, wrong ones by 1e-2 and more


def check(packer: Any, model: Any, own: Any, device: torch.device) -> None:
    """Raises Refused where they differ; every module keeps its mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            _compare(packer, own, device, model.config)
    except Refused:
        raise
    except Exception as error:  # of a model that looks at its mask, its ids or their shape itself
        raise Refused(f"it fails in the probe: {type(error).__name__}: {error}") from error
    finally:
        for module in training:
            module.training = True


def _compare(packer: Any, own: Any, device: torch.device, config: Any) -> None:
    words = config.get_text_config().vocab_size
    ids = (torch.arange(24, dtype=torch.int64, device="cpu").view(3, 8) * 7 + 3) % words
    ids[1, :4] = ids[0, :4]
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    ids, mask = ids.to(device), mask.to(device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    layout = layout_of(ids, mask, least=1)
    padded = _hidden(own(**inputs, use_cache=False), mask)
    packed = _hidden(packer.packed(own, inputs, layout), mask)
    scale = padded.abs().max()
    limit = _LIMIT * scale
    if padded.dtype != torch.float32:
        # What another order of the rows changes, four times.
        flipped = {name: x.flip(0) for name, x in inputs.items()}
        other = own(**flipped, use_cache=False).last_hidden_state.flip(0)
        limit = torch.maximum(4 * (other[mask != 0] - padded).abs().max(), 32 * limit)
    difference = (packed - padded).abs().max()
    if not bool(difference <= limit):
        raise Refused(f"hidden states {float(difference / scale):.1e} off when packed")


def _hidden(output: Any, mask: Tensor) -> Tensor:
    hidden: Tensor = output.last_hidden_state[mask != 0]
    return hidden

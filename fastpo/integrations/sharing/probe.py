"""On the first call of a model: does it compute the same packed as padded?

Names and flags do not tell of every model what its layers look at. Two rows with half in common and
one with pads on its left go through it both ways, without gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...layout.tree import layout_of
from . import noise, refusals
from .packed import Refused

# In float32 right models differ by 2e-5 at most, one with 0.3 % of a row's mean mixed in by 1e-3.
_LIMIT = 1e-3
_HALVES = (torch.bfloat16, torch.float16)


def check(packer: Any, model: Any, own: Any, device: torch.device) -> None:
    """Raises Refused where they differ; every module keeps its mode.

    A forward that draws noise is compared in evaluation: drawn in another shape, noise differs.
    """
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), _uncached(), _stirred(model), noise.kept(device):
            before = noise.states(device)
            try:
                _compare(packer, own, device, model.config)
            except Refused:
                if not noise.moved(before, device):
                    raise
                _set(training, False)
                _compare(packer, own, device, model.config)
    except (Refused, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of a model that looks at its mask, its ids or their shape itself
        raise Refused(f"it fails in the probe: {type(error).__name__}: {error}") from error
    finally:
        _set(training, True)


def draws(model: Any, own: Any, device: torch.device) -> bool:
    """Does it draw noise in the mode it is in? The generators stay where they were.

    Asked of generators and of outputs: another thread may have drawn.
    """
    inputs = _inputs(model.config, device)
    with torch.no_grad(), _uncached(), noise.kept(device):
        before = noise.states(device)
        found = own(**inputs, use_cache=False).last_hidden_state
        if not noise.moved(before, device):
            return False
        again = own(**inputs, use_cache=False).last_hidden_state
        return not torch.equal(found, again)


def _set(modules: list[nn.Module], training: bool) -> None:
    """Past `train`, in which layers of others merge their weights."""
    for module in modules:
        module.training = training


@contextmanager
def _uncached() -> Iterator[None]:
    """Autocast would keep copies of weights that are not what they will be."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """Trained tensors that are all zero hold other numbers: a step would show what they hide."""
    zeros = [] if refusals.sharded(model) else [p for p in model.parameters() if _is_zero(p)]
    own = [p.data for p in zeros]
    try:
        for p, zero in zip(zeros, own, strict=True):
            numbers = torch.arange(1, p.numel() + 1, dtype=torch.float32, device=p.device)
            p.data = (numbers.sin_() / 10).view(p.shape).to(zero)
        yield
    finally:
        for p, zero in zip(zeros, own, strict=True):
            p.data = zero


def _is_zero(p: Tensor) -> bool:
    if not (p.requires_grad and p.numel() and type(p.data) is Tensor) or p.is_meta:
        return False
    few = p.data.flatten()[:64]  # most weights are done with here
    return not bool(few.any()) and not bool(p.data.any())


def _inputs(config: Any, device: torch.device) -> dict[str, Tensor]:
    words = config.get_text_config().vocab_size
    ids = (torch.arange(24, dtype=torch.int64, device="cpu").view(3, 8) * 7 + 3) % words
    ids[1, :4] = ids[0, :4]
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _compare(packer: Any, own: Any, device: torch.device, config: Any) -> None:
    inputs = _inputs(config, device)
    mask = inputs["attention_mask"] != 0
    layout = layout_of(*inputs.values(), least=1)
    padded = own(**inputs, use_cache=False).last_hidden_state
    packed = packer.packed(own, inputs, layout).last_hidden_state
    # In float64 eager attention is NaN in rows with pads on their left, padded.
    known = mask & padded.isfinite().all(-1)
    if not bool(known.any()):
        raise Refused("hidden states that are not finite")
    scale = padded[known].abs().max()
    limit = _LIMIT * scale
    dtype = _dtype(padded)
    if dtype in _HALVES:
        # Other kernels round otherwise: those of the two rows without the one that has pads.
        apart = own(input_ids=inputs["input_ids"][:2], use_cache=False).last_hidden_state
        rounding = 4 * (apart - padded[:2])[known[:2]].abs().max()
        limit = rounding.clamp(2 * torch.finfo(dtype).eps * scale, 32 * limit)
    difference = (packed - padded)[known].abs().max()
    if not bool(difference <= limit):
        raise Refused(f"hidden states {float(difference / scale):.1e} off when packed")


def _dtype(x: Tensor) -> torch.dtype:
    """That of the products: autocast's, if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

"""What a model or a layer is under the wrappers of others."""

from __future__ import annotations

from typing import Any


def uncompiled(layer: Any) -> Any:
    """Without `torch.compile(layer)`'s wrapper, whose child the layer is.

    Not by the attribute: under its name accelerate's compiled regions keep the model they are not.
    """
    return getattr(layer, "_modules", {}).get("_orig_mod", layer)


def bare(model: Any) -> Any:
    """The model under a compiler's wrapper and PEFT's."""
    model = uncompiled(model)
    unwrap = getattr(model, "get_base_model", None)  # PEFT's
    return model if unwrap is None else unwrap()

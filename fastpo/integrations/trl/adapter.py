"""LoRA and DoRA on `lm_head` in TRL's trainers, which refuse them because their head ignores them.

Two seams per trainer: the class they test the output embeddings with, and the function that puts
the fused head on a model.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any

from ...ops.tiles.known import is_quantised, refusal
from ..adapter import base_layer, is_adapter, unsupported
from ..heads import output_layer
from ..seams.seam import Make, Replacement, Seam
from .head import HEAD, adapted, unserved

SHARES = "_fastpo_shares"  # an attribute of a forward of ours
_VERSIONS = ("1.15", "1.16")
_MODULES = ("dpo", "kto", "sft", "grpo", "rloo")
_HEAD = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")


class _TunerLayer(Replacement):
    """In `isinstance(layer, BaseTunerLayer)`: no, for the adapters fastpo scores through."""

    def __instancecheck__(self, layer: Any) -> bool:
        if not isinstance(layer, self.original):
            return False
        if is_quantised(base_layer(layer)):
            return unsupported(layer) is not None
        return unsupported(layer) is not None or unserved(weight=layer.weight) is not None


class _AddHead(Replacement):
    """`add_fused_lm_head`: the model's calls then tell the head which adapter layer it has.

    sharing: whether prompts are computed once, or only no padding; None: neither.
    """

    def __init__(self, original: Any, sharing: bool | None) -> None:
        super().__init__(original)
        self.sharing = sharing

    def __call__(
        self,
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        head = output_layer(model)
        if is_adapter(head):
            _check(head, cast_lm_head_to_fp32)
        self.original(model, temperature, cast_lm_head_to_fp32, *args, **kwargs)
        own = is_adapter(head) or (is_quantised(head) and refusal(head) is None)
        if not own and self.sharing is None:
            return
        from ..sharing.backbone import packing  # imports transformers

        # TRL's own, of whichever model it is called with: a deep copy has weights of its own.
        fused, sharing = model.forward.__func__, self.sharing

        @functools.wraps(fused)
        def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return fused(self, *args, **kwargs)
            with ExitStack() as stack:
                if own:
                    stack.enter_context(adapted(output_layer(self)))
                if sharing is not None and _is_patched():
                    stack.enter_context(packing(self, sharing))
                return fused(self, *args, fused_lm_head=True, **kwargs)

        setattr(forward, SHARES, sharing)
        model.forward = MethodType(forward, model)


def _check(head: Any, cast: bool) -> None:
    if cast:
        # TRL's cast goes past an adapter: completions would be sampled without it.
        raise ValueError(
            "cast_lm_head_to_fp32: expected False with an adapter on lm_head, got True"
        )
    # TRL asks for the layer of a PeftModel only; in another model an adapter may be injected.
    if (why := unsupported(head)) is not None:
        raise ValueError(f"lm_head: expected an adapter of LoRA, got {why}")


def _is_patched() -> bool:
    """Trainers that were built under a patch outlive it."""
    return isinstance(HEAD.current(), Replacement)


def replacements(sharing: bool | None) -> dict[Seam, Make]:
    made: dict[Seam, Make] = {}
    for name in _MODULES:
        module = f"trl.trainer.{name}_trainer"
        # Absent without PEFT.
        made[Seam(module, "BaseTunerLayer", (), _VERSIONS, optional=True)] = _TunerLayer
        made[Seam(module, "add_fused_lm_head", _HEAD, _VERSIONS)] = partial(
            _AddHead, sharing=sharing
        )
    return made

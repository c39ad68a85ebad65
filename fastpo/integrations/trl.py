"""TRL's fused head, taken over at the one name all its trainers share.

`trl.trainer.utils.add_fused_lm_head` finds the valid positions, gathers what FSDP, ZeRO-3 or PEFT
hide, and hands [N, H] hidden states to `_ChunkedLogProbFunction.apply`, which it looks up in its
module at every call. DPO, KTO, SFT, GRPO and RLOO scripts and their metrics stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._head import HeadOptions, score
from ._seam import Replacement, Seam, kept, replace

_MODULE = "trl.trainer.utils"
_VERSIONS = ("1.15", "1.16")
HEAD = Seam(
    _MODULE,
    "_ChunkedLogProbFunction",
    (
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
    _VERSIONS,
    member="forward",
)
# 1.15 compacts everywhere and has no such switch.
COMPACT = Seam(_MODULE, "_use_triton", ("device",), _VERSIONS, optional=True)
GATHER = Seam(_MODULE, "maybe_gather_lm_head_ctx", ("params",), _VERSIONS)

# TRL's names in the order of its results.
_OUTPUTS = {
    "log_probs": "logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}


class FusedHead(Replacement):
    """`linear_logps` behind the `apply` of TRL's autograd function."""

    def __init__(self, original: Any, budget: int | None, backend: str | None) -> None:
        super().__init__(original)
        self.budget, self.backend = budget, backend

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,  # TRL's tile width; fastpo chooses its own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:  # each [N], None where not requested
        unknown = set(outputs) - set(_OUTPUTS)
        if unknown:
            raise RuntimeError(
                f"outputs: expected a tuple of {', '.join(_OUTPUTS)}, got {tuple(outputs)}; "
                f"fastpo works with trl {' and '.join(_VERSIONS)}"
            )
        wanted = tuple(_OUTPUTS[name] for name in ("log_probs", *outputs))
        options = HeadOptions(
            temperature, final_logit_softcapping, logit_scale, wanted, self.budget, self.backend
        )
        stats = score(hidden, weight, bias, targets, options, GATHER.current())
        return tuple(getattr(stats, name) for name in _OUTPUTS.values())


class Compact(Replacement):
    """Says on a CPU, too, that only the valid positions go to the head.

    TRL asks its kernel's device test; without Triton it scores every position with labels clamped.
    """

    def __call__(self, device: torch.device) -> bool:
        return device.type == "cpu" or self.original(device)


def patch(*, budget: int | None = None, backend: str | None = None) -> None:
    """Puts `fastpo.linear_logps` under every TRL trainer of this process until `unpatch`.

    budget, backend: as in `fastpo.linear_logps`. A second call only changes these two.
    Raises RuntimeError when TRL is missing or its seams have changed, and then changes nothing.
    """
    GATHER.read()
    replace({HEAD: partial(FusedHead, budget=budget, backend=backend), COMPACT: Compact})


def unpatch() -> None:
    """Gives TRL its own objects back; nothing happens when it is not patched."""
    for seam in (HEAD, COMPACT):
        seam.restore()


@contextmanager
def patched(*, budget: int | None = None, backend: str | None = None) -> Iterator[None]:
    """`patch` for the length of a block; afterwards TRL is what it was before, patched or not."""
    with kept(HEAD, COMPACT):
        patch(budget=budget, backend=backend)
        yield

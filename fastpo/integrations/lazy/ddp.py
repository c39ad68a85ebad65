"""DistributedDataParallel sends a forward's tensors through a function of its own.

It clones them there, which would take all logits. Of a promise it gets the hidden states, which
every gradient reaches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..seams.seam import Make, Replacement, Seam, replace
from .logits import promise_of, promised


class _Sink(Replacement):
    """`_DDPSink.apply`."""

    def apply(self, ddp: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        promises = [promise_of(x) for x in tensors]
        given = zip(tensors, promises, strict=True)
        found = self.original.apply(ddp, *(x if p is None else p.base.hidden for x, p in given))
        return tuple(
            x if p is None else promised(p.on((x, *p.base.operands[1:])))
            for x, p in zip(found, promises, strict=True)
        )


_VERSIONS = tuple(f"2.{minor}" for minor in range(8, 15))


def replacements() -> dict[Seam, Make]:
    arguments = ("ddp_weakref", "inputs")
    seam = Seam("torch.nn.parallel.distributed", "_DDPSink", arguments, _VERSIONS, "forward")
    return {seam: _Sink}


def serve() -> None:
    """From now on, also where no trainer is patched; it touches nothing but promises."""
    replace(replacements())

"""Tokens of several processes: gathered before the head, taken apart after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..walks.derivatives import first_derivatives
from ..walks.vocab_shard import all_gather


@dataclass(frozen=True)
class Tokens:
    """How many tokens each process of `group` has.

    name: who errors are of. grads: of each head's hidden states, does any process ask for a
    gradient? Then all take part in its backward, those without tokens, too.
    """

    name: str
    counts: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None  # None: all processes
    grads: tuple[bool, ...]

    @property
    def here(self) -> slice:
        first = sum(self.counts[: self.rank])
        return slice(first, first + self.counts[self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all processes, in their order; `x` holds those of this one."""
        # Autocast refuses to concatenate 16 bits of the other kind, here or elsewhere alone.
        with torch.autocast(x.device.type, enabled=False):
            most = max(self.counts)
            if len(x) < most:
                x = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))
            found = all_gather(x, self.group)
            if len(set(self.counts)) == 1:
                return found.flatten(0, 1)
            return torch.cat([rows[:n] for rows, n in zip(found, self.counts, strict=True)])

    def gather_hidden(self, x: Tensor, head: int = 0) -> Tensor:
        if self.grads[head] and not x.requires_grad:
            x = x.detach().requires_grad_()
        gathered: Tensor = _Gather.apply(x, self)
        return gathered

    def own(self, x: Tensor) -> Tensor:
        """The rows of this process out of those of all."""
        rows: Tensor = _Own.apply(x, self)
        return rows


# Not for a compiler, as the head between: how many tokens others have is no constant.
@torch.compiler.disable
def count(
    n: int, hiddens: Sequence[Tensor], *, name: str, group: dist.ProcessGroup | None
) -> Tokens:
    """Waits for the device. hiddens: [..., H] of each head, as they are differentiated here."""
    grads = [torch.is_grad_enabled() and x.requires_grad for x in hiddens]
    own = torch.tensor([n, *grads], dtype=torch.int64, device=hiddens[0].device)
    counts, *asked = all_gather(own, group).t().tolist()
    return Tokens(name, tuple(counts), dist.get_rank(group), group, tuple(map(any, asked)))


class _Gather(torch.autograd.Function):
    """The head's d hidden comes summed over the group and of a loss divided by its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens) -> Tensor:
        ctx.tokens = tokens
        return tokens.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.tokens.here] * len(ctx.tokens.counts), None


class _Own(torch.autograd.Function):
    """Each process knows the gradient of its own tokens; trained is the mean of the losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens) -> Tensor:
        ctx.tokens = tokens
        return x[tokens.here].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.tokens.gather(grad.detach() / len(ctx.tokens.counts))
        return *first_derivatives(ctx.tokens.name, (found,), (grad,)), None

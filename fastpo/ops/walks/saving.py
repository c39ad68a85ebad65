"""What a head saves for its backward, where hooks would carry it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def saving_hooks() -> Any:
    """The pair of hooks that tensors saved now go through, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def retained() -> bool:
    """May the backward that is under way be run again?"""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def adds_to(leaf: Tensor) -> bool:
    """Will the backward that is under way add to the gradient of this leaf?

    Not where `torch.autograd.grad` or `backward(inputs=...)` was asked for others, or for itself.
    """
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # PyTorch's of a leaf whose gradient autograd.grad returns
        return False


def checkpointed() -> bool:
    hooks = saving_hooks()
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def stays() -> AbstractContextManager[None]:
    """What is saved inside stays on its device, as if there were no hooks.

    Hooks that offload activations would send up to 4·V·H bytes of probabilities, and the weight,
    to the host and back, which spares one product of the head: the budget says how much may stay.
    Those of a checkpoint count what is saved, and drop it. In a graph that is compiled nothing is
    known of hooks.
    """
    if torch.compiler.is_compiling() or saving_hooks() is None or checkpointed():
        return nullcontext()
    return _unseen()


@contextmanager
def _unseen() -> Iterator[None]:
    # Not hooks that do nothing: behind hooks PyTorch sees no change in place of what was saved.
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)

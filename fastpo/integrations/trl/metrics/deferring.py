"""Metrics of TRL's DPO and KTO trainers without a collective and a host wait for each value.

A micro-batch of DPO makes 15 collectives and brings 15 values to the host one after another; the
device idles meanwhile. While TRL's `_compute_loss` runs, the trainer's accelerator is stood in for
by one that writes the metrics down (see `ledger.py`): one collective for a step, one transfer when
`log` averages them. Names and values are TRL's. Where a script has a trainer, a callback or a loop
of its own, which may read them earlier or in one process alone, nothing waits in any process.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .ledger import Ledger, Site
from .pending import PendingNumber

# Whose trainers and callbacks read metrics where they are logged, and nowhere else.
_KNOWN = ("trl", "transformers", "fastpo", "builtins")
_METHODS = ("training_step", "compute_loss", "_compute_loss", "compute_ref_log_probs", "log")


class Deferring:
    """The accelerator, except that what is gathered of one tensor is pending."""

    def __init__(self, accelerator: Any, ledger: Ledger) -> None:
        self._accelerator, self._ledger = accelerator, ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Any) -> Any:
        # Not a subclass: a sharded tensor, for one, has its own way of being gathered.
        if type(tensor) is not Tensor:
            return self._accelerator.gather(tensor)
        return self._ledger.gathered(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        if use_gather_object or type(input_data) is not Tensor:
            return self._accelerator.gather_for_metrics(input_data, use_gather_object)
        state = self._accelerator.gradient_state
        # The last batch is filled up with rows that were there before; known only now.
        filled = state.end_of_dataloader and state.remainder > 0
        return self._ledger.gathered(input_data, state.remainder if filled else None)


@contextmanager
def deferred(trainer: Any, compute_loss: Callable[..., Any]) -> Iterator[None]:
    """For the length of one call of `compute_loss`, a method of the trainer as TRL wrote it."""
    if not trainer.is_in_train or _watched_somewhere(trainer):
        yield
        return
    accelerator = trainer.accelerator
    ledger = vars(trainer).setdefault("_fastpo_metrics", Ledger())
    trainer.accelerator = Deferring(accelerator, ledger)
    try:
        with ledger.recording(accelerator, quotient_guards(compute_loss)):
            yield
    finally:
        trainer.accelerator = accelerator


def _watched_somewhere(trainer: Any) -> bool:
    """Processes agree at the first loss of a training: their collectives must be the same."""
    accelerator = trainer.accelerator
    if not accelerator.use_distributed:
        return _watched(trainer)
    state, known = vars(trainer).get("_fastpo_watched", (None, False))
    if state is not trainer.state:
        own = torch.tensor(float(_watched(trainer)), dtype=torch.float32, device=accelerator.device)
        known = bool(accelerator.reduce(own, reduction="sum") > 0)
        trainer._fastpo_watched = trainer.state, known
    return known


def _watched(trainer: Any) -> bool:
    """Is there code of a script's: a class, a callback, a method put on a trainer or its class?"""
    handler = getattr(trainer, "callback_handler", None)
    watching = (trainer, *getattr(handler, "callbacks", ()))
    kinds = (kind for one in watching for kind in type(one).__mro__)
    methods = (getattr(trainer, name, None) for name in _METHODS)
    modules = (getattr(one, "__module__", None) for one in (*kinds, *filter(None, methods)))
    return any(str(module).partition(".")[0] not in _KNOWN for module in modules)


def settle(trainer: Any) -> None:
    """Numbers in the place of what stood for them: Python's `sum` has its own way with floats."""
    for name, value in list(vars(trainer).items()):
        if isinstance(value, PendingNumber):
            setattr(trainer, name, value.plain())
    for metrics in getattr(trainer, "_metrics", {}).values():
        for values in metrics.values():
            values[:] = [x.plain() if isinstance(x, PendingNumber) else x for x in values]


@functools.cache
def quotient_guards(function: Callable[..., Any]) -> frozenset[Site]:
    """Where a function says `a / x if x > 0 else 0.0`.

    There nobody has to wait for x to know what comes next. By an `if x > 0:` of KTO, however, a
    batch does or does not have a metric.
    """
    try:
        code = function.__code__
        source = inspect.getsource(code)
    except (AttributeError, OSError, TypeError):
        return frozenset()
    nodes = list(ast.walk(ast.parse(textwrap.dedent(source))))
    asked = Counter(node.lineno for node in nodes if isinstance(node, ast.Compare))
    lines = [node.test.lineno for node in nodes if isinstance(node, ast.IfExp) and _divides(node)]
    return frozenset((code, code.co_firstlineno + line - 1) for line in lines if asked[line] == 1)


def _divides(node: ast.IfExp) -> bool:
    """`a / x if x > 0 else 0.0`, or with the quotient's `.item()`."""
    body = node.body
    if isinstance(body, ast.Call) and isinstance(body.func, ast.Attribute):
        body = body.func.value if body.func.attr == "item" else body
    if not (isinstance(body, ast.BinOp) and isinstance(body.op, ast.Div)):
        return False
    divisor = body.right
    guarded = f"{ast.unparse(divisor)} > 0", "0.0"
    return isinstance(divisor, ast.Name) and guarded == tuple(
        ast.unparse(part) for part in (node.test, node.orelse)
    )

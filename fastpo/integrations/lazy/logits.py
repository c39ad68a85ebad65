"""Logits that are asked for log-probabilities before they exist: a tensor around a promise.

    logits = promised(Promise.of(head, hidden))          # [..., V] of hidden [..., H]
    logits[:, :-1].log_softmax(-1).gather(-1, labels[..., None])
    promise_of(logits).logps(labels)

To autograd it is a tensor with a node of its own, whose gradients are those of a linear layer. What
`FUNCTIONS` knows goes past that node, through fastpo's head. Everything else, whether it is a
function of torch or an autograd.Function, a hook, a checkpoint or an extension, finds the values,
computed once, and autograd brings its gradient to the node.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only

from ...ops.walks.derivatives import outside_transforms, transforming
from .calls import (
    FACTS,
    GRADIENTS,
    LAYOUT,
    LIKE,
    OPENS,
    ORDERS,
    REWRITES,
    SCALES,
    asked,
    compared,
    first_words,
    fits,
    in_place,
    name_of,
    of_fsdp,
    positional,
    word_mask,
)
from .cell import Cell, Changed, Kept, Rewritten, Scaled, Values, made_of, parents
from .expressions import express
from .functions import FUNCTIONS, VIEWS
from .promise import Promise
from .rowwise import Node, Operand, Rowwise


class LazyLogits(Tensor):
    """Made by `promised`; `promise_of` gives the promise while it stands for this tensor."""

    _cell: Cell
    _real: Tensor | None
    _real_of: Any  # the node that `_real` leads to
    _past: bool  # did anything go past this tensor's own node?
    _hooked: bool  # must everything come by it?

    @staticmethod
    def __new__(cls, cell: Cell, like: Any) -> LazyLogits:
        made: LazyLogits = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        made._cell, made._real, made._past, made._hooked = cell, None, False, False
        # C functions that ask no subclass, as `to_dlpack`, would hand out memory that is not there.
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, args, kwargs = name_of(func), *positional(args, dict(kwargs or {}))
        first: Any = args[0] if args else None
        if name == "register_hook" and of_fsdp(*args):
            return first._cell.promise.base.hidden.register_hook(*args[1:])
        if name == "grad" and func.__name__ == "__get__":  # as Dynamo reads it of its inputs
            return _natively(func, args, kwargs)
        if name in GRADIENTS or name == "backward":
            for logits in _lazy((args, kwargs)):
                logits._expect_whole(name)
            for logits in _lazy(asked(name, args, kwargs)):
                logits._hook(name)
        tracing = torch._guards.TracingContext.try_get() is not None
        if name in LAYOUT and first._cell.promise is not None and not tracing:
            return func(first._cell.layout, *args[1:], **kwargs)
        traced = name in LAYOUT or (name == "untyped_storage" and tracing)
        if name in FACTS or name in GRADIENTS or traced:
            return _natively(func, args, kwargs)
        if name == "type_as":  # only the other's dtype and device count
            other: Any = args[1] if len(args) > 1 else kwargs["other"]
            kwargs = {"dtype": other.dtype, "device": other.device}
            func, args = Tensor.to, args[:1]
        if name == "__setitem__" and isinstance(first, LazyLogits):
            first._take_back(*args[1:])
        for logits in _lazy((args, kwargs)):
            logits._cell.expect_current()
        if name in LIKE and isinstance(first, LazyLogits) and not _lazy((args[1:], kwargs)):
            like = torch.empty((), dtype=first.dtype, device=first.device).expand(first.shape)
            return func(like, *args[1:], **kwargs)
        func, args = compared(func, args, _standing)
        found = NotImplemented if transforming() else _answer(func, args, kwargs)
        if found is not NotImplemented:
            return found
        if in_place(name) or "out" in kwargs or name in OPENS:
            if _stays_lazy(name, args, kwargs):
                return None if name == "__setitem__" else first
            return _change(func, name, args, kwargs)
        return _on_values(func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Under autograd: on the values."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0]._cell, args[0])
        given = (args, kwargs or {})
        for logits in _lazy(given):
            logits._expect_whole(name_of(func))
        owners = {id(logits._cell.full(name_of(func))): logits for logits in _lazy(given)}
        real = tree_map_only(LazyLogits, lambda x: x._cell.values, given)
        found = func(*real[0], **real[1])
        if func._schema.is_mutable and id(found) in owners:
            owners[id(found)]._cell.change()
            return owners[id(found)]
        return found

    def _hook(self, name: str) -> None:
        if self._past:
            raise RuntimeError(
                f"{name}: expected before anything is read of these logits, got it after; their "
                "gradient goes past them: ask for it right after the model's forward"
            )
        self._hooked, self._real = True, None

    def _expect_whole(self, name: str) -> None:
        if self._cell.watch.elsewhere:
            raise RuntimeError(
                f"{name}: expected logits that are changed in place as a whole, "
                "got a change through a view of them"
            )

    def _take_back(self, index: Any, value: Any) -> None:
        """`logits[0] += 1`: Python sets rows that were changed as a view, and are these rows'."""
        node, (leading, _) = self._cell.promise, first_words(index, self.ndim, self.shape[-1])
        if leading is None or node is None or getattr(node, "rearranged", False):
            return
        lazy = isinstance(value, LazyLogits) and value is not self
        if lazy and node.family.forget(value._cell.first, node.rows[leading]):
            value._cell.heir = self._cell.watch

    def _shared(self) -> Tensor | None:
        """The tensor of the values where a view of it lives, or was changed: autograd must know
        what changes there and here as changes of one tensor."""
        real, self._real = self._real, None
        if real is None or self._real_of is not self.grad_fn:
            return None
        found, real = weakref.ref(real), real if self._cell.watch.elsewhere else None
        self._real = found()
        return self._real

    def kept(self) -> Tensor:
        """A tensor that stays where this one is in autograd's graph now."""
        return Kept.apply(self) if self.requires_grad and torch.is_grad_enabled() else self

    def as_promised(self, name: str, node: Node) -> Tensor:
        """The values of what it stood for, whatever was done to this tensor in place since."""
        return self._cell.promised(name, node)

    def _seen(self, name: str) -> Tensor:
        """A tensor of the values whose gradient comes by this one."""
        self._cell.tell(name)
        wanted = self.requires_grad and torch.is_grad_enabled()
        if self.requires_grad and not wanted:  # perhaps in a function that has this tensor's node
            self._expect_whole(name)
        real, node = self._real, self.grad_fn
        if real is None or (wanted and not real.requires_grad) or self._real_of is not node:
            real = Values.apply(self, name)
            self._real, self._real_of = real, node
        return real

    # Traced into a compiled region as the tensor of its values.

    @property
    def _inner(self) -> Tensor:
        self._expect_whole("torch.compile")
        values = self._cell.full("torch.compile")
        self._cell.open = True  # inductor's code counts no version
        return values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> LazyLogits:
        return LazyLogits(Cell(None, inner["_inner"]), inner["_inner"])


class _Made(torch.autograd.Function):
    """The node of promised logits."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, *operands: Tensor | None) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.graph = cell.graph
        return LazyLogits(cell, cell.promise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.graph.gradients(ctx, grad, ctx.needs_input_grad[1:]))


def promised(promise: Node) -> LazyLogits:
    """The tensor [*rows.shape, V] that a promise, or a function of some, stands for."""
    if not (promise.requires_grad and torch.is_grad_enabled()):
        promise = promise.detach()
    made: LazyLogits = _Made.apply(Cell(promise), *promise.operands)
    return made


def promise_of(logits: Any) -> Promise | None:
    """What log-probabilities may be asked of instead; None for real logits, for functions of some,
    and for lazy ones that were changed, hooked or put elsewhere into autograd's graph."""
    node = _standing(logits)
    if not isinstance(node, Promise):
        return None
    logits._past = True
    return node.gathered


def _standing(logits: Any) -> Node | None:
    """What the tensor stands for still."""
    if not isinstance(logits, LazyLogits) or logits._hooked or logits._cell.promise is None:
        return None
    cell, own = logits._cell, getattr(logits.grad_fn, "graph", None)
    if cell.changed or (logits.requires_grad and own is not cell.graph):
        return None
    cell.expect_current()
    assert cell.promise is not None
    made_here = logits.requires_grad or not cell.promise.requires_grad
    return cell.promise if made_here else cell.promise.detach()


def promises(student: Any, teacher: Any) -> tuple[Promise, Promise] | None:
    """`promise_of` both, in shards where their heads are; None, and neither counts as read, where
    one has real logits, or is of an adapter on a quantised head, which are not one weight."""
    one, other = _standing(student), _standing(teacher)
    if not (isinstance(one, Promise) and isinstance(other, Promise)):
        return None
    if not (one.base.joins and other.base.joins):
        return None
    student._past = teacher._past = True
    return one, other


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    """What is known without logits, its promises as tensors."""
    lazy = _lazy((args, kwargs))
    nodes = {id(x): _standing(x) for x in lazy}
    if func not in VIEWS:
        nodes = {key: _gathered(node) for key, node in nodes.items()}
    if not lazy or None in nodes.values() or any(made_of(x, lambda y: y._hooked) for x in lazy):
        return NotImplemented
    if func in ORDERS and any(x._cell.values is not None for x in lazy):
        return NotImplemented  # words of theirs may have been read, whose last bits are these
    found = _read(func, args, kwargs, nodes)
    if args and found is nodes.get(id(args[0])):
        return args[0]  # as torch does: nothing is read yet, and it may be changed
    if isinstance(found, Rowwise):
        if func in VIEWS:
            args[0]._past = True
    elif found is not NotImplemented:
        for logits in lazy:
            _pass(logits)
    return tree_map_only((Promise, Rowwise), promised, found)


def _read(func: Any, args: Any, kwargs: Any, nodes: dict[int, Any]) -> Any:
    """By the walks of fastpo's head; else as an expression."""
    known = FUNCTIONS.get(func)
    first = nodes.get(id(args[0])) if args else None
    if known is not None and first is not None and not _lazy((args[1:], kwargs)):
        served = isinstance(first, Promise) or (func in VIEWS and not first.rearranged)
        found = known(first, *args[1:], **kwargs) if served and fits(known, args, kwargs) else None
        if found is not None and found is not NotImplemented:
            return found
    args, kwargs = tree_map_only(LazyLogits, lambda x: Operand(x, nodes[id(x)]), (args, kwargs))
    return express(func, args, kwargs)


def _gathered(node: Any) -> Any:
    return node.gathered if isinstance(node, Promise) else node


def _pass(logits: LazyLogits) -> None:
    """Gradients of what was read go past this tensor, and past those it is made of."""
    logits._past = True
    for x in parents(logits):
        _pass(x)


def _change(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A change in place: of the logits themselves through their own node, then on their values;
    where those are somebody's as well, of that tensor, whose node theirs comes after."""
    into = kwargs["out"] if "out" in kwargs else args[0]
    if not isinstance(into, LazyLogits):
        return _on_values(func, name, args, kwargs)
    if func.__name__ == "__set__":
        raise RuntimeError(f"{name}: expected to be set on a tensor in memory, got lazy logits")
    if name in OPENS:
        into._cell.open = True
        found = _on_values(func, name, args, kwargs)
        return into if in_place(name) else found
    shared = into._shared()
    values, own = (into._cell.full(name), into) if shared is None else (shared, shared)
    given = tree_map_only(LazyLogits, lambda x: own if x is into else x._seen(name), (args, kwargs))
    layout = values.shape, values.stride()
    found = _natively(func, *given)
    into._cell.change(counted=shared is not None)
    if layout != (values.shape, values.stride()):
        raise RuntimeError(
            f"{name}: expected lazy logits to keep shape {tuple(into.shape)} in place, "
            f"got {tuple(values.shape)}"
        )
    if shared is not None and shared.requires_grad and torch.is_grad_enabled():
        Changed.apply(into, shared)
        into._real_of = into.grad_fn
    return into if found is own else found


def _fresh(logits: Any) -> Node | None:
    """What it stands for, where nothing is computed of it yet."""
    node = _standing(logits)
    return None if node is None or logits._cell.values is not None or logits._past else node


def _stays_lazy(name: str, args: Any, kwargs: Any) -> bool:
    """Is what a change in place makes read lazily, too?"""
    if name == "__setitem__":
        logits, index, value = args
        mask = index if isinstance(index, LazyLogits) else word_mask(index, logits)
        known = isinstance(value, int | float) and mask is not None and mask.dtype == torch.bool
        return known and _rewrite("masked_fill_", logits, mask, value)
    if name in SCALES and fits(_scale, (name, *args), kwargs) and _scale(name, *args):
        return True
    return name in REWRITES and _rewrite(name, *args, **kwargs)


def _scale(name: str, logits: Any, by: Any) -> bool:
    """What nothing is computed of yet stays lazy; False for anything else."""
    node = _fresh(logits)
    if isinstance(by, Tensor) or not isinstance(node, Promise):
        return _rewrite(name, logits, by)
    if not name.startswith("mul") and isinstance(by, int | float):
        by = 1 / by if by else None
    scaled = node.scaled(by)
    if scaled is NotImplemented:
        return False
    Scaled.apply(logits, logits._cell.scale(replace(scaled, rows=node.rows, apart=node.apart)), by)
    return True


def _rewrite(name: str, logits: Any, *args: Any, **kwargs: Any) -> bool:
    """The same, of what is done word by word: it is read by blocks from now on."""
    node, others = _gathered(_fresh(logits)), _lazy((args, kwargs))
    nodes = {id(x): _gathered(_standing(x)) for x in others}
    if node is None or None in nodes.values():
        return False
    if any(made_of(x, lambda y: y._hooked or y._cell is logits._cell) for x in others):
        return False
    args, kwargs = tree_map_only(LazyLogits, lambda x: Operand(x, nodes[id(x)]), (args, kwargs))
    made = express(getattr(torch, name[:-1]), (Operand(promised(node), node), *args), kwargs)
    if not isinstance(made, Rowwise) or not torch.can_cast(made.dtype, node.dtype):
        return False
    made = express(Tensor.to, (Operand(promised(made), made), node.dtype), {})
    Rewritten.apply(logits, logits._cell.scale(made), *made.operands)
    return True


def _on_values(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    with outside_transforms():
        args, kwargs = tree_map_only(LazyLogits, lambda x: x._seen(name), (args, kwargs))
    return func(*args, **kwargs)


def _natively(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _lazy(tree: Any) -> list[LazyLogits]:
    return [x for x in tree_leaves(tree) if isinstance(x, LazyLogits)]

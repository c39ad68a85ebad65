"""`LazyLogits` where only a tensor will do: evaluation loops pad and gather before they read.

A script's `preprocess_logits_for_metrics` may want the best word of every position only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .functions import FUNCTIONS, METHODS
from .logits import LazyLogits

_FACTS = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_nested")
_FACTS_CALLED = ("size", "dim", "numel", "__len__")
_VIEWS = ("__getitem__", "view", "reshape", "flatten", "chunk", "split", "contiguous", "clone")
_ANSWERED = frozenset((*METHODS, *_VIEWS, "detach", "float", "mul", "div", "tanh"))


class PromisedLogits(Tensor):
    """Logits that are computed when something needs all of them, and kept from then on."""

    _lazy: LazyLogits
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, lazy: LazyLogits) -> PromisedLogits:
        made: PromisedLogits = Tensor._make_wrapper_subclass(
            cls, lazy.shape, dtype=lazy.dtype, device=lazy.device
        )
        made._lazy, made._computed = lazy, None
        return made

    def _full(self, name: str) -> Tensor:
        if self._computed is None:
            self._computed = self._lazy.real(name)
        return self._computed

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # What reads an attribute is a method of the attribute's descriptor.
        attribute = getattr(getattr(func, "__self__", None), "__name__", None)
        if attribute in _FACTS or getattr(func, "__name__", None) in _FACTS_CALLED:
            return super().__torch_function__(func, types, args, kwargs)
        answer = _answer(func, args)
        if answer is None or _promises((args[1:], kwargs)) or args[0]._computed is not None:
            return cls.__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(LazyLogits, cls, answer(args[0]._lazy, *args[1:], **kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """On the logits themselves."""
        name = getattr(func, "__name__", str(func))
        args, kwargs = tree_map_only(cls, lambda x: x._full(name), (args, kwargs or {}))
        return func(*args, **kwargs)


def _promises(tree: Any) -> list[Any]:
    return [x for x in tree_leaves(tree) if isinstance(x, PromisedLogits)]


def _answer(func: Callable[..., Any], args: Any) -> Callable[..., Any] | None:
    """What `LazyLogits` has for this function or method of its first argument."""
    if not (args and isinstance(args[0], PromisedLogits)):
        return None
    name = getattr(func, "__name__", "")
    if name in _ANSWERED and func == getattr(Tensor, name, None):
        return lambda lazy, *rest, **options: getattr(lazy, name)(*rest, **options)
    return FUNCTIONS.get(func)

"""A forward of ours on one model, for as long as its handle says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any

from torch import nn

STATE = "_fastpo"  # the attribute of a model that holds its handle
OURS = ("forward", "_replicate_for_data_parallel", STATE)


class Handle:
    """A model that calls `run` in place of its forward; `detach()` gives it back.

    Whose handle it is, is looked up on the instance at call time: a deep copy has one of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.active = model, True
        below = vars(model).get(STATE)
        # An instance may carry a forward of its own, accelerate's for one. Or it was detached under
        # somebody's wrapper, where our forward still stands.
        self.own = vars(model).get("forward") if below is None else below.own
        setattr(model, STATE, self)
        if below is None:
            self._stand_in()
        self.begin()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a deep copy, or of a pickle, which names bound methods and asks the model for them:
        by then it has ours, as the handle comes before them among its attributes."""
        vars(self).update(state)
        if self.active:
            vars(self.model)[STATE] = self  # before ours, so that this may be pickled in its turn
            self._stand_in()
            self.begin()

    def _stand_in(self) -> None:
        forward = MethodType(_wrapped(type(self.model).forward), self.model)
        replicate = MethodType(_replicate_for_data_parallel, self.model)
        vars(self.model).update(forward=forward, _replicate_for_data_parallel=replicate)

    def begin(self) -> None:
        """What a handle needs in its process, that of a copy or a pickle too."""

    def run(self, model: Any, args: Any, kwargs: Any) -> Any:
        """model: the handle's own, or a replica of it."""
        raise NotImplementedError

    def below(self, model: nn.Module) -> Callable[..., Any]:
        """The forward without ours."""
        if self.own is None:
            return functools.partial(type(model).forward, model)  # a compiler traces no new method
        return self.own if model is self.model else _moved(self.own, self.model, model)

    def prepare(self, replica: Any) -> None:
        """nn.DataParallel has copied what the model holds, in which our forward is the model's."""
        replica.forward = _moved(self.model.forward, self.model, replica)

    def detach(self) -> None:
        """The model's own forward again, also under what was wrapped around it since."""
        self.active = False
        on_top = getattr(vars(self.model).get("forward"), "__func__", None) in _OURS
        if not on_top or vars(self.model).get(STATE) is not self:
            return
        for name in OURS:
            delattr(self.model, name)
        if self.own is not None:
            self.model.forward = self.own

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attached(model: nn.Module) -> bool:
    held = vars(model).get(STATE)
    return held is not None and held.active


# Forwards of ours, whatever the forward of their model's class has become since.
_OURS: set[Callable[..., Any]] = set()


@functools.cache
def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = vars(self).get(STATE)
        # Detached since this was read from the model, perhaps by another thread.
        return forward(self, *args, **kwargs) if handle is None else handle.run(self, args, kwargs)

    ours = presented(fused_forward, forward)
    _OURS.update((ours, fused_forward))  # accelerate may have taken the outer one off
    return ours


def presented(ours: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` with the signature of `forward`, from which `generate` and `Trainer` read keywords.

    In two layers: `Accelerator.unwrap_model(model, keep_fp32_wrapper=False)` takes off all that has
    a `__wrapped__`, and the function that it is left with has to be ours, too.
    """
    functools.update_wrapper(ours, forward)
    ours.__signature__ = inspect.signature(forward)
    del ours.__wrapped__

    @functools.wraps(ours)
    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return outer


# Bound methods are pickled by their names: PyTorch's own.
def _replicate_for_data_parallel(self: Any) -> Any:
    replica = type(self)._replicate_for_data_parallel(self)
    vars(self)[STATE].prepare(replica)
    return replica


def _moved(method: Any, original: Any, replica: Any) -> Any:
    own = isinstance(method, MethodType) and method.__self__ is original
    return MethodType(method.__func__, replica) if own else method

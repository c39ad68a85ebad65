"""The functions of torch that are remembered of lazy logits, and those that reduce the words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .base import Family
from .blocks import fits_one_block, reduced, reduced_loss
from .calls import WITH_WORDS, counted, here, named, over_words
from .functions import Answer, cross_entropy
from .patterns import known_sum
from .promise import Promise
from .rowwise import NUMBERS, Operand, recorded

_WORD_BY_WORD = named("""
    exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal abs absolute neg negative sign
    pow __pow__ __rpow__ add __add__ __radd__ sub subtract __sub__ __rsub__ rsub mul multiply
    __mul__ __rmul__ div divide true_divide __truediv__ __rtruediv__ __rdiv__ maximum minimum clamp
    clip clamp_min clamp_max where masked_fill xlogy logaddexp sigmoid logsigmoid softplus relu tanh
    nan_to_num isnan isinf isfinite eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not __and__ __or__ __invert__
    clone lerp entr expit
""")
_CASTS = named("float double half bfloat16 to type_as cpu")
_OVER_WORDS = named("softmax log_softmax")
_REDUCED = named("""
    sum nansum mean logsumexp amax amin max min argmax argmin prod var std any all count_nonzero
    var_mean std_mean
""")
_OF_ALL = named("sum nansum mean max min amax amin any all")
_TWO_STEPS = named("sum nansum mean")
_SUMS = named("sum")
_MEANS = named("mean")
_STACKED = named("sum mean logsumexp amax amin")
_STACK = named("stack")
_CAT = named("cat concat concatenate")
_TOPK = named("topk")
_TAKEN = named("take_along_dim")
_PICKED = named("gather") | _TAKEN
_TURNS = named("transpose swapaxes swapdims permute movedim moveaxis")
_LOSSES = named("cross_entropy nll_loss")


def express(func: Any, args: Any, kwargs: Any) -> Any:
    """A `Rowwise`, or what a reduction gives; NotImplemented where only the logits will do."""
    found = ANSWERS.get(func)
    if found is None or "out" in kwargs or kwargs.get("inplace"):
        return NotImplemented
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Operand)]
    # Nothing is saved by waiting; but of a few rows of what waits already all logits would be made.
    if all(isinstance(x.node, Promise) and fits_one_block(x.node) for x in operands):
        return NotImplemented
    if any(getattr(x.node, "stacked", 0) for x in operands):
        return _unstacked(func, args, kwargs)
    if any(getattr(x.node, "turned", False) for x in operands):
        return _of_turned(func, args, kwargs)
    return found(func, args, kwargs)


# Remembered


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensor itself, as torch has it, where it has that dtype."""
    if not isinstance(args[0], Operand):  # `real.to(logits)`
        return NotImplemented
    made = recorded(func, args, kwargs)
    copied = "copy" in kwargs or len(args) > 2
    same = made is not NotImplemented and made.dtype == args[0].node.dtype
    return args[0].node if same and not copied else made


def _normalised(func: Any, args: Any, kwargs: Any) -> Any:
    """`softmax`, `log_softmax` over the words."""
    found = over_words(args[0].node.ndim, args, kwargs)
    return NotImplemented if found is None else recorded(func, *found)


def _kl_div(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "target", "size_average", "reduce", "reduction", "log_target")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    how = given.pop("reduction", "mean")
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        return NotImplemented
    each = recorded(func, (given.pop("input"),), {**given, "reduction": "none"})
    if each is NotImplemented or how == "none":
        return each
    if how not in ("sum", "mean", "batchmean"):
        return NotImplemented
    rows = known_sum(each)
    total = (reduced(each, [], lambda x, _: x.sum(-1)) if rows is None else rows).sum()
    return total / {"sum": 1, "mean": each.shape.numel(), "batchmean": each.shape[0]}[how]


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not all(isinstance(x, Operand) for x in parts) or set(kwargs) - {"dim"}:
        return NotImplemented
    first, *others = (x.node for x in parts)
    if not isinstance(first, Promise) or not -first.ndim <= dim < first.ndim - 1 or dim == -1:
        return NotImplemented
    return first.joined(others, dim % first.ndim)


def _broadcast(func: Any, args: Any, kwargs: Any) -> Any:
    """`broadcast_tensors`, where no logits spread."""
    parts = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    shapes = [x.node.shape if isinstance(x, Operand) else x.shape for x in parts]
    whole = torch.broadcast_shapes(*shapes)
    if any(isinstance(x, Operand) and x.node.shape != whole for x in parts):
        return NotImplemented
    return tuple(x.node if isinstance(x, Operand) else x.expand(whole) for x in parts)


def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    """`expand`, `expand_as` to the shape that it has."""
    if kwargs or not isinstance(args[0], Operand):
        return NotImplemented
    node, (to, *more) = args[0].node, args[1:]
    shape: Any = (to, *more) if isinstance(to, int) else to
    if isinstance(to, Operand | Tensor):
        shape = to.node.shape if isinstance(to, Operand) else to.shape
    sizes = zip(shape, node.shape, strict=False)
    same = len(shape) == node.ndim and all(n in (-1, own) for n, own in sizes)
    return node if same else NotImplemented


def _stack(func: Any, args: Any, kwargs: Any) -> Any:
    """Of two sides' logits, say, before a log-sum-exp over the sides."""
    parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim != 0 or set(kwargs) - {"dim"} or not all(isinstance(x, Operand) for x in parts):
        return NotImplemented
    dtype = parts[0].node.dtype
    if any(x.node.dtype != dtype for x in parts):
        return NotImplemented
    each = recorded(_first_of, tuple(parts), {})
    if each is NotImplemented:
        return each
    return replace(each, root=replace(each.root, op=_stacked, func=_stacked), stacked=len(parts))


def _first_of(*parts: Tensor) -> Tensor:
    return parts[0]


def _stacked(*parts: Tensor) -> Tensor:
    return torch.stack(parts)


def _unstacked(func: Any, args: Any, kwargs: Any) -> Any:
    """A reduction over what was stacked."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if func not in _STACKED or dim != 0 or len(args) + len(kwargs) != 2:
        return NotImplemented
    stack = args[0].node
    run = here(lambda *parts: func(torch.stack(parts), 0), stack.device)
    return replace(stack, root=replace(stack.root, op=func, func=run, family=Family()), stacked=0)


# Three sizes that tell where each has gone.
_MARK = torch.empty(2, 3, 4, dtype=torch.float32, device="meta")


def _turn(func: Any, args: Any, kwargs: Any) -> Any:
    """[B, V, T] of [B, T, V], before a loss that wants the words there."""
    operand, *rest = args
    try:
        turned = func(_MARK, *rest, **kwargs).shape
    except (RuntimeError, TypeError, IndexError):
        return NotImplemented  # whatever is wrong, the logits will tell
    if operand.node.ndim != 3 or turned != (2, 4, 3):
        return NotImplemented
    each = recorded(_first_of, (operand,), {})
    root = replace(each.root, op=func, func=_turned, family=operand.node.family)
    return replace(each, root=root, turned=True)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _of_turned(func: Any, args: Any, kwargs: Any) -> Any:
    """A loss; or what gives [B, V, T] again: another dtype, a softmax over the words."""
    dims = [kwargs.get("dim"), *args[1:]]
    words = func in _OVER_WORDS and dims in ([1], [-2], [None, 1], [None, -2])
    if words and kwargs.get("dtype") is not None:
        return NotImplemented
    if not words and (func not in _CASTS or not _plain(args[1:], kwargs)):
        return _loss_of_turned(func, args, kwargs)
    node = args[0].node
    own = node.root.parents[0].detach() if node.constant else node.root.parents[0]
    made = func(own, -1) if words else func(own, *args[1:], **kwargs)
    return node if made is own else made.transpose(1, 2)


def _loss_of_turned(func: Any, args: Any, kwargs: Any) -> Any:
    """Of [B, V, T] and targets [B, T]."""
    given = {**dict(zip(_LOSS_ARGUMENTS, args, strict=False)), **kwargs}
    operand, target = given.pop("input"), given.pop("target", None)
    fits = isinstance(operand, Operand) and isinstance(target, Tensor) and func in _LOSSES
    if not fits or target.shape != operand.node.rows.shape:
        return NotImplemented
    node = operand.node.root.nodes[0]
    node, target = node.view(node.rows.flatten()), target.flatten()
    found = NotImplemented
    if isinstance(node, Promise) and func is F.cross_entropy:
        found = cross_entropy(node, target, **given)
    if found is NotImplemented:
        found = _losses(func, (replace(operand, node=node), target), given)
    none = found is not NotImplemented and given.get("reduction") == "none"
    return found.view(operand.node.rows.shape) if none else found


# Reduced


def _reduce(func: Any, args: Any, kwargs: Any) -> Any:
    if not isinstance(args[0], Operand) or not _plain(args[1:], kwargs):
        return NotImplemented
    node, found = args[0].node, over_words(args[0].node.ndim, args, kwargs)
    if found is not None:
        (_, *rest), more = found
        alone = len(rest) + len(more) == 1
        known = known_sum(node) if func in _SUMS and alone else None
        if known is not None:
            return known
        run = here(func, node.device)
        return reduced(node, [], lambda x, _: run(x, *rest, **more))
    dtype = kwargs.get("dtype")
    if func not in _OF_ALL or len(args) > 1 or set(kwargs) - {"dtype"}:
        return NotImplemented
    if func not in _TWO_STEPS:
        return func(reduced(node, [], lambda x, _: _rows(func, x)))
    wide = dtype or (torch.float32 if node.dtype.is_floating_point else None)
    known = known_sum(node) if func in _SUMS | _MEANS else None
    if known is None:
        rows = reduced(node, [], lambda x, _: func(x, -1, dtype=wide))
    else:
        rows = known if func in _SUMS else known / node.words
    return func(rows).to(dtype or node.dtype if node.dtype.is_floating_point else rows.dtype)


def _rows(func: Any, x: Tensor) -> Tensor:
    found = func(x, -1)
    return found if isinstance(found, Tensor) else found[0]


def _plain(args: Any, kwargs: Any) -> bool:
    return all(isinstance(x, NUMBERS) for x in tree_leaves((args, kwargs)))


def _topk(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "k", "dim", "largest", "sorted")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    operand = given.pop("input")
    if given.get("dim", -1) not in (-1, operand.node.ndim - 1) or not _plain((), given):
        return NotImplemented
    given["dim"] = -1
    return reduced(operand.node, [], lambda x, _: torch.topk(x, **given))


def _pick(func: Any, args: Any, kwargs: Any) -> Any:
    """`gather(x, dim, index)`, `take_along_dim(x, index, dim)`: words of each row."""
    operand, *rest = args
    index = next((x for x in (*rest, *kwargs.values()) if isinstance(x, Tensor)), None)
    dim = next((x for x in (*rest, *kwargs.values()) if isinstance(x, int)), None)
    node = operand.node
    if index is None or dim not in (-1, node.ndim - 1) or len(rest) + len(kwargs) != 2:
        return NotImplemented
    if index.shape[:-1] != node.rows.shape:
        return NotImplemented
    index = counted(index, node.shape[-1]) if func in _TAKEN else index
    return reduced(node, [index], lambda x, given: x.gather(-1, given[0]))


_LOSS_ARGUMENTS = (
    *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "label_smoothing",
)


def _losses(func: Any, args: Any, kwargs: Any) -> Any:
    """`cross_entropy` with class weights or of probabilities, `nll_loss`: of rows [N, V]."""
    given = {**dict(zip(_LOSS_ARGUMENTS, args, strict=False)), **kwargs}
    operand, target = given.pop("input"), given.pop("target")
    old = given.get("size_average") is not None or given.get("reduce") is not None
    known = not old and given.get("reduction", "mean") in ("none", "sum", "mean")
    if not known or not isinstance(operand, Operand) or operand.node.ndim != 2:
        return NotImplemented
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if func is F.cross_entropy and (soft or isinstance(target, Operand)):
        return _soft_cross_entropy(operand, target, **given)
    node = operand.node
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        return NotImplemented
    if target.shape != node.rows.shape:
        return NotImplemented
    weight = given.get("weight")
    if weight is not None and (weight.requires_grad or weight.shape != node.shape[-1:]):
        return NotImplemented
    return reduced_loss(here(func, node.device), node, target, **given)


def _soft_cross_entropy(
    operand: Operand,
    target: Any,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Any,
) -> Any:
    """Of probabilities [N, V], lazy ones or real."""
    q, p = (x.tensor if isinstance(x, Operand) else x for x in (operand, target))
    others = any(x is not None for name, x in options.items() if name != "ignore_index")
    if others or label_smoothing or options.get("ignore_index", -100) >= 0 or p.shape != q.shape:
        return NotImplemented
    if not p.is_floating_point():
        return NotImplemented
    each = -(p * q.log_softmax(-1)).sum(-1)
    return each if reduction == "none" else getattr(each, reduction)()


ANSWERS: dict[Any, Answer] = {
    **dict.fromkeys(_WORD_BY_WORD, recorded),
    **dict.fromkeys(WITH_WORDS, recorded),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_OVER_WORDS, _normalised),
    **dict.fromkeys(_REDUCED, _reduce),
    **dict.fromkeys(_STACK, _stack),
    **dict.fromkeys(named("broadcast_tensors"), _broadcast),
    **dict.fromkeys(named("expand expand_as"), _expand),
    **dict.fromkeys(_CAT, _cat),
    **dict.fromkeys(_TOPK, _topk),
    **dict.fromkeys(_PICKED, _pick),
    **dict.fromkeys(named("kl_div"), _kl_div),
    **dict.fromkeys(_LOSSES, _losses),
    **dict.fromkeys(_TURNS, _turn),
}

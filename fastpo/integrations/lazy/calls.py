"""Calls of torch on lazy logits: their names, arguments and indices, and comparisons with words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from .promise import Promise


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a tensor says of itself, without its values.
FACTS = _names("""
    shape ndim dtype device layout requires_grad is_nested is_leaf is_cuda is_cpu is_meta is_mps
    is_xpu is_sparse is_quantized is_mkldnn itemsize nbytes names grad_fn output_nr _version _base
    _backward_hooks retains_grad size dim ndimension numel nelement __len__ is_floating_point
    is_complex is_signed is_inference element_size get_device has_names __hash__ requires_grad_
    backward detach_ _is_view is_conj is_neg
""")
# As in the memory of the model's own; the values of a view are computed without what it leaves out.
LAYOUT = _names("stride is_contiguous storage_offset")
# Its gradient, or what happens to it; log-probabilities that are known already brought theirs past.
GRADIENTS = _names("register_hook retain_grad register_post_accumulate_grad_hook grad")
# Only shape, dtype and device of the logits count.
LIKE = _names("""
    new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like empty_like full_like
    rand_like randn_like
""")
# Changes through these are seen by nobody; or they want a storage, which only the values have.
OPENS = _names("data numpy __array__ share_memory_ apply_")
# In place, and a promise still where it is by a number.
SCALES = _names("mul_ multiply_ div_ divide_ true_divide_")
# The same of what is made of logits word by word.
REWRITES = _names("add_ sub_ subtract_ clamp_ clip_ clamp_min_ clamp_max_ masked_fill_")


def of_torch(name: str) -> list[Any]:
    """What torch, torch.Tensor, torch.nn.functional and torch.special call so."""
    owners = (torch, Tensor, F, torch.special)
    return [getattr(x, name) for x in owners if callable(getattr(x, name, None))]


def named(names: str) -> set[Any]:
    return {func for name in names.split() for func in of_torch(name)}


def fits(answer: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    try:
        _signature(answer).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature = functools.cache(inspect.signature)


def in_place(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def name_of(func: Any) -> str:
    """Of a function, or of the attribute that a descriptor's method reads or sets."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(func.__self__, "__name__", name)
    return name


def asked(name: str, args: Any, kwargs: Any) -> Any:
    """Whose gradient a call wants: not that of what its backward starts from."""
    if name == "backward":
        return kwargs.get("inputs")
    return args[1:] if name == "grad" else args


def of_fsdp(logits: Any, hook: Any) -> bool:
    """FSDP2 gathers weights for the backward when it comes by what a module gave: it may wait for
    the hidden states, which every gradient reaches unless the head alone is trained."""
    own = getattr(hook, "__qualname__", "") == "FSDPState._pre_backward"
    return own and logits._cell.promise.base.hidden.requires_grad


def here(func: Any, device: torch.device) -> Any:
    """Under the autocast of now, whenever it runs."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            return func(*args, **kwargs)

    return run


# What stands before `input`, and in its place.
_FIRST = ("condition", "sorted_sequence", "tensors", "input")


def positional(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The first argument by its place, whatever it is called."""
    first = next((name for name in _FIRST if name in kwargs), None)
    return (args, kwargs) if args or first is None else ((kwargs.pop(first),), kwargs)


def over_words(ndim: int, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """The arguments with the last dimension by its name -1; None for another, or for none."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or isinstance(dim, bool) or dim not in (-1, ndim - 1):
        return None
    if "dim" in kwargs:
        return args, {**kwargs, "dim": -1}
    return (args[0], -1, *args[2:]), kwargs


def counted(index: Tensor, words: int) -> Tensor:
    """As `take_along_dim` has it: below zero from the end."""
    return torch.where(index < 0, index + words, index)


def leading_index(index: Any, ndim: int) -> Any:
    """The index without its part for the vocabulary, which must be all of it; else None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = [_consumes(part) for part in parts]
    if None in consumed:
        return None
    taken = sum(n for n in consumed if n is not None)
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (ndim - taken)
        taken = ndim
    if taken == ndim:
        last = parts.pop()
        if not (isinstance(last, slice) and last == slice(None)):
            return None
    return tuple(parts)


def first_words(index: Any, ndim: int, words: int) -> tuple[Any, int]:
    """`logits[:, 1:, :n]`: the index without its part for the vocabulary, and n; else None."""
    leading = leading_index(index, ndim)
    *parts, last = index if isinstance(index, tuple) else (index,)
    if leading is None and isinstance(last, slice):
        start, stop, step = last.indices(words)
        if (start, step) == (0, 1):  # what begins later is changed in place more often than read
            return leading_index((*parts, slice(None)), ndim), stop
    return leading, words


def _consumes(part: Any) -> int | None:
    """How many dimensions; None for what only a tensor can tell."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Tensor):
        return part.ndim if part.dtype in (torch.bool, torch.uint8) else 1
    plain = isinstance(part, int | slice) and not isinstance(part, bool)
    listed = isinstance(part, list) and all(isinstance(x, int) for x in part)
    return 1 if plain or listed else None


def leading_sizes(own: torch.Size, shape: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Sizes before the vocabulary's; None for another dtype, or words in another shape."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    *leading, last = sizes
    if last == -1 and prod(leading) == own[:-1].numel() > 0:
        last = own[-1]
    return tuple(leading) if last == own[-1] else None


def words_of_rows(rows: Tensor, index: Any, vocab: int) -> tuple[Tensor, Tensor, torch.Size] | None:
    """`logps[torch.arange(n), labels]`, `logits[:, -1, [7, 11]]`: rows, the words of each [..., K]
    or of all of them [K], and the shape that they come in; None for anything else, and for what
    torch would not copy."""
    *parts, word = index if isinstance(index, tuple) else (index,)
    leading = leading_index((*parts, slice(None)), rows.ndim + 1)
    if isinstance(word, list) and all(type(x) is int for x in word):
        word = torch.tensor(word, dtype=torch.int64, device=rows.device)
    if isinstance(word, Tensor) and word.dtype == torch.bool and word.shape == (vocab,):
        word = word.nonzero().squeeze(1)
    listed = isinstance(word, Tensor) and word.ndim and word.dtype in (torch.int64, torch.int32)
    if leading is None or not listed:
        return None
    found, word = rows[leading], counted(word.to(rows.device), vocab)
    if not any(isinstance(x, Tensor | list) for x in leading):
        return found, word.flatten(), torch.Size((*found.shape, *word.shape))
    if not all(isinstance(x, Tensor | list | int) for x in leading):
        return None
    found, word = torch.broadcast_tensors(found, word)
    return found, word.unsqueeze(-1), found.shape


def word_mask(index: Any, logits: Tensor) -> Tensor | None:
    """`logits[..., words] = -inf`: which words of every row [V]; None where not of every row."""
    *parts, words = index if isinstance(index, tuple) else (index,)
    rows = [x for x in parts if x is not Ellipsis]
    every = all(isinstance(x, slice) and x == slice(None) for x in rows)
    listed = isinstance(words, Tensor) and words.dtype in (torch.int64, torch.int32, torch.bool)
    plain = isinstance(words, int | slice | list) and not isinstance(words, bool)
    room = logits.ndim - 1 - len(rows)
    if not every or not (listed or plain) or room < 0 or (room and len(rows) == len(parts)):
        return None
    mask = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    mask[words] = True
    return mask


# Words picked of logits, compared with the logits: both from the same products. A walk's numbers
# have other last bits than a block's, by which a word would exceed itself. And their log-sum-exp,
# which is taken from the logits.

SUM = -1  # in place of a word


class As(torch.autograd.Function):
    """Numbers of one, the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, other: Tensor) -> Tensor:
        return numbers.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


@dataclass(frozen=True, eq=False)
class Words:
    """Which words of which rows some numbers are, all three in the same layout."""

    call: tuple[Any, ...]  # of the head, and how its products are read
    rows: Tensor
    index: Tensor
    version: int  # of the numbers


_picked: Any = WeakTensorKeyDictionary()  # the words of numbers


def remember(found: Tensor, logits: Promise, index: Tensor | int) -> Tensor:
    """The same numbers [*rows.shape, K], which `compared` knows for words of these logits."""
    with torch.inference_mode(False):  # whose tensors do not tell when they change
        found = found.clone() if found.is_inference() else found.contiguous()
    owner = _owner(found)
    if owner.numel() == found.numel():
        rows = logits.rows.unsqueeze(-1).expand(found.shape).contiguous()
        own = torch.as_tensor(index, dtype=torch.int64, device=rows.device).expand(found.shape)
        own = own.clone(memory_format=torch.contiguous_format)
        _picked[owner] = Words(_call(logits), rows, own, owner._version)
    return found


def compared(func: Any, args: Any, standing: Callable[[Any], Any]) -> tuple[Any, Any]:
    """`logits >= number` as a function of the logits and of the word whose number that is."""
    if func not in _COMPARED or len(args) != 2:
        return func, args
    for logits, number, mine in ((*args, _COMPARED[func][0]), (*args[::-1], _COMPARED[func][1])):
        node = standing(logits)
        if isinstance(node, Promise) and type(number) is Tensor:
            index = _index(number, node)
            if index is not None and not bool((index == SUM).any()):
                return mine, (logits, index)
    return func, args


def is_sum(number: Any, logits: Promise) -> bool:
    """Is it the log-sum-exp of each row, with its gradient, which nobody else asked for?"""
    if type(number) is not Tensor or number.requires_grad != logits.requires_grad:
        return False
    if any(x._backward_hooks or x.retains_grad for x in (number, _owner(number))):
        return False
    index = _index(number, logits)
    return index is not None and bool((index == SUM).all())


def _index(number: Tensor, logits: Promise) -> Tensor | None:
    """Which word of each row of these logits it is, perhaps in a view of what was picked."""
    owner = _owner(number)
    words: Words | None = _picked.get(owner)
    if words is None or owner._version != words.version:
        return None
    if words.call != _call(logits.gathered) or number.shape != (*logits.rows.shape, 1):
        return None
    place = number.size(), number.stride(), number.storage_offset()
    rows, index = (x.as_strided(*place) for x in (words.rows, words.index))
    return index if torch.equal(rows.squeeze(-1), logits.rows) else None


def _owner(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _call(logits: Promise) -> tuple[Any, ...]:
    reading = logits.inner, logits.capped, logits.outer, logits.normalized, logits.sign
    # Other hidden states may come to lie in the same place.
    head = logits.base.marks, logits.words
    return StorageWeakRef(logits.base.hidden.untyped_storage()), head, reading


def _with(func: Any, logits: Tensor, index: Tensor) -> Any:
    return func(logits, logits.gather(-1, index))


def _of(func: Any, logits: Tensor, index: Tensor) -> Any:
    return func(logits.gather(-1, index), logits)


_COMPARISONS = named("""
    eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    not_equal less less_equal greater greater_equal
""")
_COMPARED = {func: (partial(_with, func), partial(_of, func)) for func in _COMPARISONS}
WITH_WORDS = {each for pair in _COMPARED.values() for each in pair}
# What tells which words are the greatest.
ORDERS = {*_COMPARISONS, *WITH_WORDS, *named("topk argmax argmin min amax amin")}

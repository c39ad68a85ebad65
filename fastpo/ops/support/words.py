"""`Support`: the words of each token that its sampler kept, as engines return them or as a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..walks.checks import check_integer, check_kind, check_number, shape_of

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Rule:
    """What the sampler did: after the temperature top-k, then top-p, then min-p.

    top_k: the k largest z and all that equal the k-th.  top_p: of these the largest whose
    probabilities first reach top_p, and all that equal the last of them.  min_p: of these the ones
    with at least min_p times the largest probability. The most likely word always stays.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class Support:
    """Words of N tokens, ragged: token i has ids[offsets[i]:offsets[i + 1]], in any order.

    ids: [M] int32 or int64.  offsets: [N + 1], from 0 to M and never falling; it is read on the
    host. A word that is named twice counts once, and -1 is no word, as in a padded tensor. A token
    without words has no restriction: its log-probability is over the whole vocabulary, as engines
    mean an empty mask.
    Raises ValueError for wrong shapes, dtypes and offsets.
    """

    def __init__(self, ids: Tensor, offsets: Tensor) -> None:
        check_kind(ids=ids, offsets=offsets)
        for name, x in {"ids": ids, "offsets": offsets}.items():
            if x.dim() != 1 or x.dtype not in _INTEGERS:
                raise ValueError(
                    f"{name}: expected one dimension of int32 or int64, "
                    f"got {x.dtype} of {shape_of(x)}"
                )
        host = offsets.to("cpu", torch.int64)
        steps = host.diff()
        if (
            len(host) < 1
            or int(host[0]) != 0
            or int(host[-1]) != len(ids)
            or bool((steps < 0).any())
        ):
            raise ValueError(
                f"offsets: expected numbers that rise from 0 to {len(ids)}, the length of ids, "
                f"got {host.tolist() if len(host) <= 8 else [*host[:4].tolist(), '...']}"
            )
        self.ids, self.counts = ids.long(), steps

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | None], device: Any = None) -> Support:
        """From a list of word ids for each token; None or an empty one: no restriction.

        Raises ValueError for what is no list, as in one token's words alone, and for what is no
        integer: an engine's mask of booleans names no words.
        """
        for token, one in enumerate(lists):
            if one is not None and not hasattr(one, "__len__"):
                wanted = "a list of word ids for each token"
                raise ValueError(f"lists: expected {wanted}, got {one!r} at token {token}")
        sizes = [0 if one is None else len(one) for one in lists]
        offsets = torch.tensor([0, *sizes], dtype=torch.int64, device="cpu").cumsum(0)
        flat = [word for one in lists if one is not None for word in _plain(one)]
        for kind in {*map(type, flat)}:
            if kind is bool or not issubclass(kind, Integral):
                got = next(repr(word) for word in flat if type(word) is kind)
                raise ValueError(f"lists: expected word ids, which are integers, got {got}")
        return cls(torch.tensor(flat, dtype=torch.int64, device=device), offsets)

    @staticmethod
    def rule(
        *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
    ) -> Rule:
        """The words that a sampler with these settings keeps of the policy as it is now.

        The choice has no gradient. Words that tie with the last one that stays, stay: a sampler may
        have drawn lots. top_k of 0 and -1, top_p of 1 and min_p of 0 leave all words in, as in vLLM
        and transformers. Raises ValueError for anything else outside its range.
        """
        if top_k is not None:
            top_k = check_integer("top_k", top_k, "an integer >= -1 or None", lambda x: x >= -1)
        if top_p is not None:
            check_number("top_p", top_p, "a number in (0, 1] or None", lambda x: 0 < x <= 1)
        if min_p is not None:
            check_number("min_p", min_p, "a number in [0, 1] or None", lambda x: 0 <= x <= 1)
        return Rule(
            top_k if top_k is not None and top_k > 0 else None,
            float(top_p) if top_p is not None and top_p < 1 else None,
            float(min_p) if min_p is not None and min_p > 0 else None,
        )

    @classmethod
    def cat(cls, parts: Sequence[Support]) -> Support:
        """Of the tokens of all parts, in their order; at least one."""
        if not len(parts):
            raise ValueError("parts: expected at least one, got none")
        counts = torch.cat([part.counts for part in parts])
        return cls._made(torch.cat([part.ids for part in parts]), counts)

    @classmethod
    def _made(cls, ids: Tensor, counts: Tensor) -> Support:
        found = cls.__new__(cls)
        found.ids, found.counts = ids, counts
        return found

    def split(self, sizes: Sequence[int]) -> list[Support]:
        """Parts of so many tokens each."""
        if sum(sizes) != len(self) or min(sizes, default=0) < 0:
            raise ValueError(f"sizes: expected a sum of {len(self)}, got {list(sizes)}")
        parts = self.counts.split(list(sizes))
        words = self.ids.split([int(counts.sum()) for counts in parts])
        return [self._made(*both) for both in zip(words, parts, strict=True)]

    def __getitem__(self, tokens: slice) -> Support:
        """Tokens from one to another, one after the other."""
        if not isinstance(tokens, slice):
            raise TypeError(f"tokens: expected a slice, got {type(tokens).__name__}")
        first, last, step = tokens.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens: expected a slice of step 1, got {tokens}")
        return self.split((first, max(last - first, 0), len(self) - max(first, last)))[1]

    def __len__(self) -> int:
        return len(self.counts)


def _plain(words: Any) -> Any:
    """Of a tensor or an array Python's numbers."""
    return words.tolist() if hasattr(words, "tolist") else words

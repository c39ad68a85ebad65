"""The k best words of every row, tile by tile: highest logit first, lowest word first in a tie.

torch.topk leaves open which of several equal values it returns. So a logit and its word travel as
one int64 key, no two of them equal: the order is total, on every device.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).min  # sorts behind every word, even one of logit -inf
_WORDS = 0xFFFFFFFF


def pack(z: Tensor, words: Tensor) -> Tensor:
    """int64 keys that sort as (z ascending, word descending). z: float32; words: int64 < 2**32."""
    # -0.0 + 0.0 is 0.0: the two zeros compare equal, their bits do not.
    bits = (z + 0.0).view(torch.int32).long()
    # Negative floats count upwards in magnitude; as integers they shall count downwards.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered << 32) + (_WORDS - words)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """z float32 and word int64 of every key."""
    ordered = keys >> 32
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.int().view(torch.float32), _WORDS - (keys & _WORDS)


def merge(
    best: Tensor,  # [n, k] int64 keys of the words so far, descending; NEVER where none
    z: Tensor,  # [n, v] float32 logits of the next words
    first: int,  # word of the first column
) -> Tensor:  # [n, k]
    """The best of both. A word among the k best is in one of the k groups with the best maxima.

    So one pass finds the maximum of each group, and only √(v·k) cells and groups become keys. Two
    groups with the same maximum hold words in the order of the groups, so ties stay right.
    """
    k, v = best.shape[1], z.shape[1]
    # Width and number of the groups: both sorts below then see √(v·k) keys.
    width = max(1, isqrt(v // k))
    columns = _range(0, v, z).expand_as(z)
    if width > 1:
        columns = _candidates(z, k, width)
        z = z.gather(1, columns)
    return torch.cat((best, pack(z, columns + first)), 1).topk(k).values


def without(z: Tensor, ids: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:  # [n, k], [n]
    """[n, k - 1] of each: the list without one word, or, where that is not in it, its last."""
    passed = (ids == exclude.unsqueeze(1)).cumsum(1)[:, :-1]
    columns = _range(0, ids.shape[1] - 1, ids) + passed
    return z.gather(1, columns), ids.gather(1, columns)


def _candidates(z: Tensor, k: int, width: int) -> Tensor:
    """Columns [n, c] of the k best groups of `width` words, and of the words beyond the last."""
    n, v = z.shape
    groups = v // width
    maxima = z[:, : groups * width].unflatten(1, (groups, width)).amax(2)
    keys = pack(maxima, _range(0, groups, z).expand_as(maxima))
    _, chosen = unpack(keys.topk(k).values)
    inside = chosen.unsqueeze(2) * width + _range(0, width, z)
    rest = _range(groups * width, v, z).expand(n, -1)
    return torch.cat((inside.flatten(1), rest), 1)


def _range(first: int, last: int, z: Tensor) -> Tensor:
    return torch.arange(first, last, dtype=torch.int64, device=z.device)

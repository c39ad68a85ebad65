"""Kernels over a few words in plain PyTorch: any device, and the others' definition."""

from __future__ import annotations

import torch
from torch import Tensor

_CELLS = 4 * 2**20  # elements gathered at once


def products(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    if not len(weight):  # of a head in shards, whose words are all in other processes
        out.zero_()
        return
    step = max(1, _CELLS // max(1, ids.shape[1] * hidden.shape[1]))
    for a in range(0, len(ids), step):
        part = slice(a, a + step)
        words = weight[ids[part].clamp_min(0)].float()  # [n, K, H]
        # A library's batched product would round by how many rows there are.
        x = words.mul_(hidden[part].float().unsqueeze(1)).sum(-1)
        out[part] = torch.where(ids[part] < 0, 0.0, x)


def sums(coefficients: Tensor, index: Tensor, offsets: Tensor, rows: Tensor, out: Tensor) -> None:
    if not len(rows):
        out.zero_()
        return
    scale = torch.where(index < 0, 0.0, coefficients).unsqueeze(1)
    taken, step = index.clamp_min(0), max(1, _CELLS // max(1, len(index)))
    # Words before the first offset belong to no sum.
    first = offsets[:1]
    for h in range(0, rows.shape[1], step):
        terms = rows[:, h : h + step].index_select(0, taken).float().mul_(scale)
        terms = terms.masked_fill_(index.unsqueeze(1) < 0, 0.0)  # 0·NaN is NaN
        before = torch.zeros_like(first)
        edges = torch.cat((before, offsets))
        found = torch.segment_reduce(terms, "sum", offsets=edges, axis=0, unsafe=True)
        out[:, h : h + step] = found[1:].to(out.dtype)

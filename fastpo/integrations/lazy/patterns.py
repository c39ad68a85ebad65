"""Expressions that a walk over the words knows: an entropy, however it is written.

    -(p * logp).sum(-1)        Σ p log p, of one promise
    lse - (p * logits).sum(-1)

Three products instead of four, and row kernels instead of blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .promise import Promise
from .rowwise import Node, Rowwise

_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__)
_EXPS = (torch.exp, Tensor.exp)
_SOFTMAXES = (torch.softmax, Tensor.softmax, torch.nn.functional.softmax)


def expectation(node: Node) -> Tensor | None:
    """Σ_v p_v x_v of every row, where the node is p·x and x the logits or log-probabilities that p
    is of; None for anything else."""
    if not isinstance(node, Rowwise) or node.root.op not in _PRODUCTS or len(node.root.nodes) != 2:
        return None
    if not node.fresh or node.root.numbers or node.root.kwargs or len(node.root.args) != 2:
        return None
    for p, x in (node.root.nodes, node.root.nodes[::-1]):
        logits = _distribution(p)
        if logits is not None and isinstance(x, Promise) and logits.alike(x.plain):
            return _expected(logits, x)
    return None


def _distribution(node: Node) -> Promise | None:
    """The logits whose softmax this is."""
    if not isinstance(node, Rowwise) or not node.fresh or len(node.root.nodes) != 1:
        return None
    of = node.root.nodes[0]
    if not isinstance(of, Promise) or node.dtype != of.dtype:
        return None
    exponent = node.root.op in _EXPS and of.normalized and of.sign == 1
    softmax = node.root.op in _SOFTMAXES and not of.normalized
    return of.plain if exponent or softmax else None


def _expected(logits: Promise, x: Promise) -> Tensor:
    anything = torch.zeros_like(logits.rows)
    stats = logits.stats(anything, "entropy", "lse")
    assert stats.entropy is not None and stats.lse is not None
    found: Any = x.sign * -stats.entropy if x.normalized else stats.lse - stats.entropy
    return found

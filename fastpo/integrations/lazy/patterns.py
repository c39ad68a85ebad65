"""Expressions that a walk over the words knows: an entropy, a KL, however they are written.

    -(p * logp).sum(-1)        Σ p log p, of one promise
    lse - (p * logits).sum(-1)
    (p * (logp - logq)).sum(-1)        KL(p‖q), of two
    F.kl_div(logq, logp, log_target=True, reduction="sum")

Three products of a head instead of four, and row kernels instead of blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import divergence
from .promise import Promise
from .rowwise import Node, Root, Rowwise, Slot

_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__)
_DIFFERENCES = (torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__)
_EXPS = (torch.exp, Tensor.exp)
_SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


def known_sum(node: Node) -> Tensor | None:
    """Σ_v of every row; None where no walk gives it."""
    if not isinstance(node, Rowwise):
        return None
    found = _expectation(node)
    return _relative_entropy(node) if found is None else found


def _expectation(node: Rowwise) -> Tensor | None:
    """Σ_v p_v x_v, where the node is p·x and x the logits or log-probabilities that p is of."""
    for p, x in _factors(node.root) if node.fresh else ():
        logits = _distribution(p)
        if logits is not None and isinstance(x, Promise) and logits.alike(x.plain):
            return _expected(logits, x)
    return None


def _relative_entropy(node: Rowwise) -> Tensor | None:
    """KL(p‖q), where the node is kl_div(log q, log p), kl_div(log q, p) or p·(log p - log q)."""
    sides = _of_kl_div(node.root) if node.root.op is F.kl_div else _of_product(node.root)
    if sides is None or not all(side.base.joins for side in sides):
        return None
    q, p = (side.view(side.rows.flatten()[node.rows]) for side in sides)
    return divergence(q, p, "forward_kl")


def _of_kl_div(root: Root) -> tuple[Promise, Promise] | None:
    if len(root.nodes) != 2 or root.numbers:
        return None
    q, p = _logarithm(root.nodes[0]), root.nodes[1]
    of_p = _logarithm(p) if root.kwargs.get("log_target") else _distribution(p)
    return None if q is None or of_p is None else (q, of_p)


def _of_product(root: Root) -> tuple[Promise, Promise] | None:
    for p, difference in _factors(root):
        if isinstance(difference, Rowwise) and difference.fresh:
            logits = _distribution(p)
            log_p, log_q = map(_logarithm, _pair(difference.root, _DIFFERENCES) or (p, p))
            if logits and log_p and log_q and logits.alike(log_p):
                return log_q, log_p
    return None


def _pair(root: Root, ops: tuple[Any, ...]) -> tuple[Node, Node] | None:
    """Two lazy tensors, the only arguments of one of these."""
    plain = root.op in ops and root.args == (Slot(0), Slot(1)) and not root.kwargs
    return (root.nodes[0], root.nodes[1]) if plain else None


def _factors(root: Root) -> tuple[tuple[Node, Node], ...]:
    """In either order; of anything else than a product there are none."""
    pair = _pair(root, _PRODUCTS)
    return () if pair is None else (pair, pair[::-1])


def _logarithm(node: Node) -> Promise | None:
    """The logits whose log-softmax this is."""
    if not isinstance(node, Promise) or not node.normalized or node.sign != 1:
        return None
    return node.plain


def _distribution(node: Node) -> Promise | None:
    """The logits whose softmax this is."""
    if not isinstance(node, Rowwise) or not node.fresh or len(node.root.nodes) != 1:
        return None
    of = node.root.nodes[0]
    if not isinstance(of, Promise) or node.dtype != of.dtype:
        return None
    if node.root.op in _EXPS:
        return _logarithm(of)
    return of if node.root.op in _SOFTMAXES and not of.normalized else None


def _expected(logits: Promise, x: Promise) -> Tensor:
    anything = torch.zeros_like(logits.rows)
    stats = logits.stats(anything, "entropy", "lse")
    assert stats.entropy is not None and stats.lse is not None
    found: Any = x.sign * -stats.entropy if x.normalized else stats.lse - stats.entropy
    return found

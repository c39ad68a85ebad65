"""Expressions that a walk over the words knows: an entropy, a KL, a cross-entropy of two models.

    -(p * logp).sum(-1)        Σ p log p, of one promise
    lse - (p * logits).sum(-1)
    (p * (logp - logq)).sum(-1)        KL(p‖q), of two
    F.kl_div(logq, logp, log_target=True, reduction="sum")
    -(p * logq).sum(-1)        KL(p‖q) + H(p), of a p without gradient
    (p * logq).masked_fill(q_logits.isinf(), 0).sum(-1)        the same, where all is finite
    (mask * (p * logq)).sum(-1)        the same times what each row has one of
    b * F.kl_div(logm, logq, log_target=True) + (1 - b) * F.kl_div(logm, logp, log_target=True)
        β·KL(q‖m) + (1-β)·KL(p‖m) with logm = logsumexp(stack([logp + log(1 - b), logq + log b]))

Three products of a head instead of four, and row kernels instead of blocks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import divergence
from .promise import Promise
from .rowwise import Node, Root, Rowwise, Slot

_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__)
_DIFFERENCES = (torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__)
_ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_LOGSUMEXPS = (torch.logsumexp, Tensor.logsumexp)
_EXPS = (torch.exp, Tensor.exp)
_LOGS = (torch.log, Tensor.log)
_SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)
_NEGATIVES = (torch.neg, torch.negative, Tensor.neg, Tensor.negative)
_FILLS = (torch.masked_fill, Tensor.masked_fill)
_ISINF = (torch.isinf, Tensor.isinf)
_ORS = (torch.logical_or, Tensor.logical_or, torch.bitwise_or, Tensor.bitwise_or, Tensor.__or__)


def known_sum(node: Node) -> Tensor | None:
    """Σ_v of every row; None where no walk gives it."""
    if not isinstance(node, Rowwise):
        return None
    product = _unmasked(node)
    if product is not None:
        found = known_sum(product)
        return found if found is not None and bool(found.isfinite().all()) else None
    factored = _factored(node)
    if factored is not None:
        found = known_sum(factored[0])
        return None if found is None else found * factored[1]
    known = _expectation, _relative_entropy, _cross_entropy, _jensen_shannon
    walks = (walk(node) for walk in known)
    return next((found for found in walks if found is not None), None)


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
    return None if sides is None else _divergence(node, *sides)


def _divergence(
    node: Rowwise, q: Promise, p: Promise, kind: str = "forward_kl", beta: float = 0.5
) -> Tensor | None:
    if not (q.base.joins and p.base.joins):
        return None
    q, p = (side.view(side.rows.flatten()[node.rows]) for side in (q, p))
    return divergence(q, p, kind, beta)


def _cross_entropy(node: Rowwise) -> Tensor | None:
    """Σ_v p_v log q_v of two models, where the node is p·log q and p a constant: its gradient
    would be a difference of those of the two sums."""
    for of_p, x in _factors(node.root) if node.fresh else ():
        p, q = _distribution(of_p), _logarithm(x)
        found = None if p is None or q is None or p.requires_grad else _divergence(node, q, p)
        if p is not None and found is not None:
            entropy = p.stats(torch.zeros_like(p.rows), "entropy").entropy
            assert entropy is not None
            return -found - entropy
    return None


def _jensen_shannon(node: Rowwise) -> Tensor | None:
    """β·KL(q‖m) + (1-β)·KL(p‖m) with m = β·q + (1-β)·p, or that times a number."""
    pair = _pair(node.root, _ADDS)
    terms = [x for x in map(_from_mixture, pair or ()) if x is not None]
    if len(terms) < 2 or terms[0].mixture is not terms[1].mixture:
        return None
    p, q = terms if terms[0].logits.requires_grad else terms[::-1]
    whole, parts = p.weight + q.weight, _parts(p.mixture)
    for term in terms:
        share = next((share for x, share in parts if term.logits.alike(x)), math.nan)
        if not abs(share * whole - term.weight) <= 4 * torch.finfo(node.dtype).eps * abs(whole):
            return None
    found = _divergence(node, p.logits, q.logits, "jsd", q.weight / whole)
    return None if found is None else whole * found


class _Term(NamedTuple):
    """weight · KL(softmax(logits)‖mixture)"""

    logits: Promise
    weight: float
    mixture: Node


def _from_mixture(node: Node) -> _Term | None:
    inner, weight = (isinstance(node, Rowwise) and _factored(node)) or (node, 1)
    if not isinstance(inner, Rowwise) or not inner.fresh or inner.root.op is not F.kl_div:
        return None
    root, of_rows = inner.root, isinstance(weight, Tensor) and weight.ndim > 0
    if of_rows or len(root.nodes) != 2 or root.numbers or not root.kwargs.get("log_target"):
        return None
    logits = _logarithm(root.nodes[1])
    return None if logits is None else _Term(logits, float(weight), root.nodes[0])


def _parts(mixture: Node) -> list[tuple[Promise, float]]:
    """The two logits whose softmaxes are mixed, and their shares."""
    if not isinstance(mixture, Rowwise) or not mixture.fresh:
        return []
    if mixture.root.op not in _LOGSUMEXPS or mixture.root.args != (Slot(0), Slot(1)):
        return []
    found = [_shifted(x) for x in mixture.root.nodes]
    return [x for x in found if x is not None]


def _shifted(node: Node) -> tuple[Promise, float] | None:
    """log softmax + log share."""
    if not isinstance(node, Rowwise) or not node.fresh or node.root.op not in _ADDS:
        return None
    by: Any = next((x for x in node.root.args if x != Slot(0)), None)
    logits = _logarithm(node.root.nodes[0])
    if logits is None or node.root.kwargs or not _is_number(by):
        return None
    return logits, math.exp(by) if by < 1 else math.inf


def _factored(node: Rowwise) -> tuple[Node, Any] | None:
    """What is multiplied by a number or by one of every row, and that."""
    root = node.root
    if not node.fresh or len(root.nodes) != 1 or root.kwargs:
        return None
    if root.op in _NEGATIVES:
        return root.nodes[0], -1
    if root.op not in _PRODUCTS:
        return None
    factor = next((x for x in root.args if x != Slot(0)), None)
    if isinstance(factor, Slot):
        of_rows = root.numbers[0].shape[-1] == 1
        return (root.nodes[0], root.numbers[0].squeeze(-1)) if of_rows else None
    return (root.nodes[0], factor) if _is_number(factor) else None


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, Tensor) and not x.ndim)


def _unmasked(node: Rowwise) -> Rowwise | None:
    """What had its terms of infinite logits set to 0; not where a bias may exclude words, whose
    divergence from what has them a walk gives as a large number."""
    root = node.root
    if root.op not in _FILLS or root.args != (Slot(0), Slot(1), 0) or root.kwargs:
        return None
    product, mask = root.nodes
    if not node.fresh or not isinstance(product, Rowwise):
        return None
    masked = _infinite(mask)
    return product if masked and masked <= _heads(product) else None


def _infinite(mask: Node) -> set[Any]:
    """Whose logits' `isinf` this is, or the union of two; none for another mask."""
    if not isinstance(mask, Rowwise) or not mask.fresh:
        return set()
    (first, *more), op = mask.root.nodes, mask.root.op
    if op in _ISINF and isinstance(first, Promise) and not first.normalized:
        return _heads(first) if first.base.bias is None else set()
    sides = [_infinite(x) for x in (first, *more)]
    return sides[0] | sides[1] if _pair(mask.root, _ORS) and all(sides) else set()


def _heads(node: Node) -> set[Any]:
    """Which calls of a head it is made of, with gradient or without."""
    if isinstance(node, Promise):
        return {node.base.marks}
    return {mark for x in node.root.nodes for mark in _heads(x)}


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
    """The logits whose log-softmax this is, or the logarithm of their softmax."""
    if isinstance(node, Rowwise) and node.fresh and node.root.op in _LOGS:
        return _distribution(node.root.nodes[0])
    if not isinstance(node, Promise) or not node.normalized or node.sign != 1:
        return None
    return node.plain


def _distribution(node: Node) -> Promise | None:
    """The logits whose softmax this is."""
    if not isinstance(node, Rowwise) or len(node.root.nodes) != 1 or node.rearranged:
        return None
    of = node.root.nodes[0]
    if not isinstance(of, Promise) or node.dtype not in (of.dtype, torch.float32):
        return None
    of = of if node.dtype == of.dtype else of.copy(dtype=node.dtype)
    of = of if node.fresh else of.view(of.rows.flatten()[node.rows])
    if node.root.op in _EXPS:
        return _logarithm(of)
    return of if node.root.op in _SOFTMAXES and not of.normalized else None


def _expected(logits: Promise, x: Promise) -> Tensor:
    anything = torch.zeros_like(logits.rows)
    stats = logits.stats(anything, "entropy", "lse")
    assert stats.entropy is not None and stats.lse is not None
    found: Any = x.sign * -stats.entropy if x.normalized else stats.lse - stats.entropy
    return found

"""Other people's heads, called as their documentation says; each refuses in its own words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from fastpo.testing import HeadInputs

from .variants import CASES, STATISTICS, Case, Forward, Outcome, Variant

# TRL's own: `trl.trainer.utils` hands it to the head.
_TRL_TILE = 32_768
_PAIRS = 4


def rival_variants() -> list[Variant]:
    gradient: tuple[Case, ...] = ("frozen", "trainable")
    table: list[tuple[str, Callable[[], Forward], tuple[Case, ...]]] = [
        ("trl", _trl(), tuple(CASES)),
        ("trl statistics", _trl(STATISTICS), ("score", "trainable")),
        ("liger ce", _liger_ce("none"), tuple(CASES)),
        ("liger ce sum", _liger_ce("sum"), gradient),
        ("liger scaled ce", _liger_scaled, tuple(CASES)),
        ("liger dpo", _liger_dpo, gradient),
        ("cce", _cce("cce"), tuple(CASES)),
        ("cce exact", _cce("cce_exact"), gradient),
        ("quack sum", _quack, gradient),
        ("torch linear_ce", _torch("none"), tuple(CASES)),
        ("torch linear_ce sum", _torch("sum"), gradient),
        # By themselves its chunks are of a few rows where V is large, and slow.
        ("torch linear_ce 256", _torch("none", 256), tuple(CASES)),
        ("torch linear_ce sum 256", _torch("sum", 256), gradient),
    ]
    return [
        Variant(name, case, make, compiles=name == "liger dpo")
        for name, make, cases in table
        for case in cases
    ]


def _from_nll(nll: torch.Tensor) -> Outcome:
    """[N] losses, or their sum, which is all that may then be differentiated."""
    return Outcome(-nll) if nll.dim() else Outcome(-nll.detach().reshape(1), loss=nll)


def _trl(statistics: tuple[str, ...] = ()) -> Callable[[], Forward]:
    def make() -> Forward:
        from trl.kernels import ChunkedLogProbFunction

        _import_tools_of_trl()

        def logps(x: HeadInputs) -> Outcome:
            options = (None, x.labels, 1.0, _TRL_TILE, None, 1.0, statistics)
            return Outcome(ChunkedLogProbFunction.apply(x.hidden, x.weight, *options)[0])

        return logps

    return make


def _import_tools_of_trl() -> None:
    """What TRL's backward imports; of `datasets` it wants one class, which no head meets."""
    if find_spec("datasets") is not None:
        return  # the backward imports for itself
    stand_in: Any = ModuleType("datasets")
    stand_in.__spec__ = ModuleSpec("datasets", None)
    stand_in.IterableDataset = type("IterableDataset", (), {})
    sys.modules["datasets"] = stand_in
    try:
        import_module("trl.trainer.utils")
    finally:
        del sys.modules["datasets"]


def _liger_ce(reduction: str) -> Callable[[], Forward]:
    def make() -> Forward:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
        return lambda x: _from_nll(loss(x.weight, x.hidden, x.labels))

    return make


def _liger_scaled() -> Forward:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return lambda x: _from_nll(Scaled.apply(x.hidden, x.weight, x.labels))


def _liger_dpo() -> Forward:
    """Sequences of one length, chosen first; its log-probabilities are sums over each."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(use_ref_model=False)

    def logps(x: HeadInputs) -> Outcome:
        tokens, hidden = x.hidden.shape
        rows = 2 * _PAIRS
        if tokens % rows:
            raise ValueError(f"tokens: expected a multiple of {rows}, got {tokens}")
        batch = x.hidden.view(rows, -1, hidden)
        value, sides = loss(x.weight, batch, x.labels.view(rows, -1))
        return Outcome(torch.cat(sides[:2]).detach(), loss=value)

    return logps


def _cce(implementation: str) -> Callable[[], Forward]:
    def make() -> Forward:
        from cut_cross_entropy import linear_cross_entropy

        options: dict[str, Any] = {"reduction": "none", "impl": implementation}
        return lambda x: _from_nll(linear_cross_entropy(x.hidden, x.weight, x.labels, **options))

    return make


def _quack() -> Forward:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: _from_nll(
        chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="sum")
    )


def _torch(reduction: str, rows: int | None = None) -> Callable[[], Forward]:
    """rows: of a chunk; None: as it chooses."""

    def make() -> Forward:
        if not hasattr(functional, "linear_cross_entropy"):
            raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        given: dict[str, Any] = (
            {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
        )
        chunked = torch.nn.LinearCrossEntropyOptions(**given)
        options: dict[str, Any] = {"reduction": reduction, "options": chunked}
        loss = functional.linear_cross_entropy
        return lambda x: _from_nll(loss(x.hidden, x.weight, x.labels, **options))

    return make

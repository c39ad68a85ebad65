"""Tensors to the addresses the compiled row kernels take; shared by the CPU and CUDA adapters."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backend as R

if TYPE_CHECKING:
    from ..._C import BackwardTile, ForwardTile

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiled() -> tuple[ModuleType | None, str]:
    """fastpo._C, or None and why it did not load."""
    try:
        from ... import _C
    except ImportError as error:
        how = "`pip install .` in a checkout of fastpo builds it where there is a C++17 compiler"
        return None, f"fastpo._C is not there ({error}); {how}"
    return _C, ""


def forward_tile(
    tile: Tensor,
    first: int,
    labels: Tensor,
    bias: Tensor | None,
    state: Tensor,
    logit_map: R.LogitMap,
    stats: int,
    kept: Tensor | None,
    anchors: Tensor | None,
    fold_cap: bool,
) -> ForwardTile:
    from ..._C import ForwardTile

    n, v = tile.shape
    check_matrix(tile, n, v, torch.float32)
    check_fields(state, R.STATE, n)
    _check_words(labels, bias, first, n, v)
    check_inverse(logit_map, n)
    if kept is not None:
        check_matrix(kept, n, v)
    _check_anchors(anchors, n, kept is not None)
    return ForwardTile(
        tile=tile.data_ptr(),
        tile_stride=tile.stride(0),
        n=n,
        v=v,
        first=first,
        labels=labels.data_ptr(),
        bias=address(bias),
        state=state.data_ptr(),
        state_stride=state.stride(0),
        inner=inner(logit_map),
        cap=logit_map.cap,
        inverse=address(logit_map.inverse),
        stats=stats,
        kept=address(kept),
        kept_dtype=0 if kept is None else DTYPES[kept.dtype],
        kept_stride=0 if kept is None else kept.stride(0),
        anchors=address(anchors),
        fold_cap=fold_cap,
    )


def backward_tile(
    source: Tensor,
    anchors: Tensor | None,
    first: int,
    labels: Tensor,
    bias: Tensor | None,
    grads: Tensor,
    logit_map: R.LogitMap,
    entropy_grad: bool,
    out: Tensor,
) -> BackwardTile:
    from ..._C import BackwardTile

    n, v = source.shape
    check_matrix(source, n, v, torch.float32 if anchors is None else source.dtype)
    check_matrix(out, n, v)
    check_fields(grads, R.GRADS, n)
    _check_words(labels, bias, first, n, v)
    check_inverse(logit_map, n)
    _check_anchors(anchors, n, anchors is not None)
    return BackwardTile(
        source=source.data_ptr(),
        source_dtype=DTYPES[source.dtype],
        source_stride=source.stride(0),
        anchors=address(anchors),
        n=n,
        v=v,
        first=first,
        labels=labels.data_ptr(),
        bias=address(bias),
        grads=grads.data_ptr(),
        grads_stride=grads.stride(0),
        inner=inner(logit_map),
        cap=logit_map.cap,
        inverse=address(logit_map.inverse),
        factor=logit_map.factor,
        entropy_grad=entropy_grad,
        out=out.data_ptr(),
        out_dtype=DTYPES[out.dtype],
        out_stride=out.stride(0),
    )


def inner(logit_map: R.LogitMap) -> float:
    """What multiplies x + bias before the soft-cap, or instead of it."""
    if logit_map.softcap is None:
        return logit_map.factor
    return logit_map.logit_scale / logit_map.softcap


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def check_inverse(logit_map: R.LogitMap, n: int) -> None:
    if logit_map.inverse is not None:
        _check_vector(logit_map.inverse, n, torch.float64)


def check_matrix(x: Tensor, n: int, v: int, dtype: torch.dtype | None = None) -> None:
    # What has no numbers may have any strides.
    assert x.shape == (n, v) and (n == 0 or v == 1 or x.stride(1) == 1), (x.shape, x.stride())
    assert x.dtype in DTYPES and dtype in (None, x.dtype), x.dtype


def _check_vector(x: Tensor, n: int, dtype: torch.dtype) -> None:
    assert x.shape == (n,) and (n <= 1 or x.stride(0) == 1), (x.shape, x.stride())
    assert x.dtype == dtype, x.dtype


def _check_anchors(anchors: Tensor | None, n: int, wanted: bool) -> None:
    assert (anchors is not None) == wanted
    if anchors is not None:
        _check_vector(anchors, n, torch.float32)


def check_fields(x: Tensor, fields: int, n: int, dtype: torch.dtype = torch.float32) -> None:
    assert x.shape == (fields, n) and (n <= 1 or x.stride(1) == 1), (x.shape, x.stride())
    assert x.dtype == dtype, x.dtype


def _check_words(labels: Tensor, bias: Tensor | None, first: int, n: int, v: int) -> None:
    _check_vector(labels, n, torch.int64)
    check_bias(bias, first, v)


def check_bias(bias: Tensor | None, first: int, v: int) -> None:
    if bias is not None:
        assert first + v <= len(bias), (first, v, len(bias))
        _check_vector(bias, len(bias), torch.float32)

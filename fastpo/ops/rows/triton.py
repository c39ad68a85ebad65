"""Row kernels in Triton: any CUDA device, and a CPU under Triton's interpreter.

Triton is imported by the first call, so that fastpo imports on a machine without it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import backend as R
from .architecture import too_old


def is_installed() -> bool:
    return find_spec("triton") is not None


def unavailable(device: torch.device) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return f"runs on cuda devices, got {device}"
    if not is_installed():
        return "triton is not installed"
    if device.type == "cuda":
        return too_old(device)
    from triton.runtime.jit import JITFunction

    from ...kernels import rows

    # @triton.jit reads the flag when the kernels are imported; the environment may have changed.
    if isinstance(rows.rows_fwd_kernel, JITFunction):
        return "runs on a CPU only when TRITON_INTERPRET=1 is set before triton is imported"
    return None


def map_arguments(logit_map: R.LogitMap) -> dict[str, Any]:
    """z = post·inverse·x, or post·inverse·tanh(scale·x)."""
    found: dict[str, Any] = {"inverse": logit_map.inverse, "softcap": logit_map.softcap is not None}
    if logit_map.softcap is None:
        return found | {"scale": 1.0, "post": logit_map.factor}
    return found | {"scale": logit_map.logit_scale / logit_map.softcap, "post": logit_map.cap}


def forward(
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
) -> None:
    from ...kernels.rows import rows_fwd

    rows_fwd(
        tile,
        first,
        labels,
        bias,
        state,
        kept,
        anchors,
        **map_arguments(logit_map),
        stats=stats,
        headroom=0.0 if kept is None else R.headroom(kept.dtype),
        fold_cap=fold_cap,
    )


def backward(
    source: Tensor,
    anchors: Tensor | None,
    first: int,
    labels: Tensor,
    bias: Tensor | None,
    grads: Tensor,
    logit_map: R.LogitMap,
    entropy_grad: bool,
    out: Tensor,
) -> None:
    from ...kernels.rows import rows_bwd

    rows_bwd(
        source,
        anchors,
        first,
        labels,
        bias,
        grads,
        out,
        **map_arguments(logit_map),
        factor=logit_map.factor,
        entropy_grad=entropy_grad,
    )


def rescale(total: Tensor, before: Tensor, anchors: Tensor) -> None:
    from ...kernels.rescale import rescale as rescale_rows

    rescale_rows(total, before, anchors)


def finish(state: Tensor, stats: tuple[str, ...], ignored: Tensor | None) -> dict[str, Tensor]:
    from ...kernels.finish import ALWAYS
    from ...kernels.finish import finish as finish_rows

    n, dtypes = state.shape[1], {"is_top1": torch.bool}
    results = {x: state.new_empty(n, dtype=dtypes.get(x)) for x in (*ALWAYS, *stats)}
    finish_rows(state, ignored, results)
    return results


def row_grads(
    saved: R.Saved, upstream: R.Upstream, logit_map: R.LogitMap, ignored: Tensor | None
) -> Tensor:
    from ...kernels.row_grads import row_grads as write

    grads = saved.logps.new_empty(R.GRADS, len(saved.logps))
    write(
        saved,
        upstream,
        ignored,
        grads,
        inverse=logit_map.inverse,
        softcap=logit_map.softcap is not None,
        cap=logit_map.cap,
        factor=logit_map.factor,
    )
    return grads

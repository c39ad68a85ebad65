"""Hidden states before their products, and a tile of raw products to logits in place."""

from __future__ import annotations

from torch import Tensor

from ..rows import backend as R


def to_logits(tile: Tensor, first: int, bias: Tensor | None, logit_map: R.LogitMap) -> Tensor:
    """z of `logit_map`, written over `tile` [n, v] float32; no further tile is needed."""
    if bias is not None:  # [V] float32
        tile.add_(bias[first : first + tile.shape[1]])
    if logit_map.softcap is not None:
        tile.mul_(logit_map.logit_scale / logit_map.softcap)
        return tile.tanh_().mul_(logit_map.tempered(logit_map.cap, tile))
    plain = logit_map.factor == 1.0 and logit_map.inverse is None
    return tile if plain else tile.mul_(logit_map.tempered(logit_map.factor, tile))


def nan_where_infinite(hidden: Tensor, logit_map: R.LogitMap) -> Tensor:
    """Where there is a soft-cap: its tanh would make finite logits of them."""
    if logit_map.softcap is None:
        return hidden
    finite = hidden.isfinite()
    if hidden.device.type == "cpu" and bool(finite.all()):
        return hidden
    return hidden.where(finite, float("nan"))

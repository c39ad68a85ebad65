"""A head [V, H] that is not in memory: a tensor whose words are made when they are sliced.

The walks slice a weight and look its rows up, and ask nothing else of it, so what answers these two
is a weight to all of them. It is frozen: there is nothing that could hold its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import planner
from ..walks.checks import DTYPES, shape_of


class TileSource(Protocol):
    """Words of a head [V, H], made when they are needed; `fastpo.linear_logps` takes one as weight.

    shape: (V, H).  dtype: of the tiles, float32, bfloat16 or float16.  device: of the tiles.
    stored, where there is one: the tensor that tiles are made of. A backward that reads them again
    raises where it was changed in place.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def tile(self, v0: int, v1: int) -> Tensor:
        """Words [v0, v1), a tensor [v1 - v0, H]."""
        ...


class Tiled(Tensor):
    """The words of a source. Slices, rows and the mean word are tensors; nothing else is there.

    An operation that would need all words at once is an error: none makes the whole head unseen.
    """

    source: TileSource
    version: int | None  # of what is stored, when the call began
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: TileSource) -> Tiled:
        shape, dtype, device = _described(source)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.source = source
        made.version = _version_of(made.stored)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Tiled({self.source!r})"

    @property
    def stored(self) -> Tensor | None:
        """What the words are made of, where the source says: its memory, and when it changed."""
        return getattr(self.source, "stored", None)

    def words(self, v0: int, v1: int) -> Tensor:
        if _version_of(self.stored) != self.version:
            raise RuntimeError(
                f"weight: expected a tile source as the call found it (version {self.version}), "
                f"got one changed in place (version {_version_of(self.stored)})"
            )
        found: Any = self.source.tile(v0, v1)
        expected = (v1 - v0, self.shape[1])
        name = f"weight.tile({v0}, {v1})"
        if not isinstance(found, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {found!r}")
        if shape_of(found) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {shape_of(found)}")
        if found.dtype != self.dtype:
            raise ValueError(f"{name}: expected dtype {self.dtype}, got {found.dtype}")
        if found.device != self.device:
            raise ValueError(f"{name}: expected device {self.device}, got {found.device}")
        return found

    @property
    def width(self) -> int:
        """Words of one tile, as the walks have them."""
        return planner.tile_shape(1, self.shape[0], self.device.type).vocab

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First word and the one after the last."""
        vocab, step = self.shape[0], self.width
        return ((v, min(v + step, vocab)) for v in range(0, vocab, step))

    def whole(self) -> Tensor:
        """All words at once, for whoever asks for that by name."""
        return torch.cat([self.words(*tile) for tile in self.tiles()])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = _ANSWERS.get(func)
        if answer is None or not isinstance(args[0], Tiled):
            raise RuntimeError(
                f"weight: expected its words to be read by tiles, got {func}, which needs all of "
                "a tile source's at once"
            )
        return answer(*args, **(kwargs or {}))


def _version_of(stored: Any) -> int | None:
    return stored._version if isinstance(stored, Tensor) and not stored.is_inference() else None


def _described(source: TileSource) -> tuple[torch.Size, torch.dtype, torch.device]:
    for name in ("shape", "dtype", "device"):
        if not hasattr(source, name):
            raise ValueError(
                "weight: expected a tile source with shape, dtype and device, "
                f"got {type(source).__name__} without {name}"
            )
    shape = source.shape
    if len(shape) != 2 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"weight.shape: expected (V, H), got {shape!r}")
    if source.dtype not in DTYPES:
        raise ValueError(
            f"weight.dtype: expected float32, bfloat16 or float16, got {source.dtype!r}"
        )
    if getattr(source, "requires_grad", False):
        raise ValueError("weight: expected a tile source without gradient, got requires_grad=True")
    # "cuda" to the one that is meant, as tensors have it.
    return (
        torch.Size(shape),
        source.dtype,
        torch.empty(0, dtype=source.dtype, device=source.device).device,
    )


def tiled(weight: Any) -> Tensor:
    """A weight that the walks can read: a tile source as a tensor, anything else as it is."""
    if not isinstance(weight, Tensor) and hasattr(weight, "tile"):
        return Tiled(weight)
    if isinstance(weight, Tiled) and weight.requires_grad:
        raise ValueError("weight: expected a tile source without gradient, got requires_grad=True")
    return weight


def outside_graphs(function: Callable[..., Any], *weights: Tensor) -> Callable[..., Any]:
    """The same; of a source's words, which are no tensors of a graph, called as if none were made.

    A compiler would trace its walk tile by tile.
    """
    if torch.compiler.is_compiling() and any(isinstance(x, Tiled) for x in weights):
        return torch.compiler.disable(function)
    return function


def dense(weight: Tensor) -> Tensor:
    """All words in memory."""
    return weight.whole() if isinstance(weight, Tiled) else weight


def _detach(weight: Tiled) -> Tiled:
    made = Tiled(weight.source)
    made.version = weight.version
    return made


def _slice(
    weight: Tiled, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    if dim != 0 or step != 1:
        raise RuntimeError(f"weight: expected a slice of words, got one along {dim} by {step}")
    first, last, _ = slice(start, end).indices(weight.shape[0])
    if last - first > weight.width:
        raise RuntimeError(f"weight: expected {weight.width} words at most, got [{first}, {last})")
    return weight.words(first, last)


def _index_select(weight: Tiled, dim: int, index: Tensor) -> Tensor:  # [n] -> [n, H]
    """Rows wherever they are; NaN for one that is nowhere. No device is asked which tiles count."""
    if dim != 0:
        raise RuntimeError(f"weight: expected words to be selected, got columns (dim {dim})")
    found = torch.full(
        (len(index), weight.shape[1]), float("nan"), dtype=weight.dtype, device=weight.device
    )
    for v0, v1 in weight.tiles():
        here = (index >= v0) & (index < v1)
        if index.device.type == "cpu" and not bool(here.any()):
            continue
        rows = weight.words(v0, v1).index_select(0, (index - v0).clamp_(0, v1 - v0 - 1))
        torch.where(here.unsqueeze(1), rows, found, out=found)
    return found


def _index(weight: Tiled, indices: list[Tensor | None]) -> Tensor:
    ids, *others = indices
    if others or ids is None or ids.dtype != torch.int64:
        raise RuntimeError(f"weight: expected numbers of words, got {indices}")
    return _index_select(weight, 0, ids.flatten()).view(*ids.shape, -1)


def _mean(
    weight: Tiled, dim: list[int], keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    if dim != [0] or keepdim:
        raise RuntimeError(f"weight: expected the mean word (dim 0), got dim {dim}")
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for v0, v1 in weight.tiles():
        total += weight.words(v0, v1).sum(0, dtype=torch.float32)
    return (total / weight.shape[0]).to(dtype or weight.dtype)


_ANSWERS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.detach.default: _detach,
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.index_select.default: _index_select,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten.mean.dim: _mean,
}

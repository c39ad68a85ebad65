"""What every primitive asks of its arguments, before the first kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

OUTPUTS = ("logps", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "lse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype eager products would run in here."""
    kind = hidden.device.type
    if kind == "meta":  # which PyTorch has no autocast for
        return hidden.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    of: str = "",
    *,
    part: bool = False,
) -> None:
    """of: what the names of a head's tensors begin with, here and below. part: of a head in shards,
    of which a process may have no word."""
    check_whole(labels=labels)
    check_head(hidden, weight, bias, of, part=part)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {shape_of(hidden)[:-1]}, got {shape_of(labels)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected device {hidden.device}, got {labels.device}")


def check_beside(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    of: str,
    *,
    part: bool = False,
) -> None:
    """A further head of the same tokens."""
    check_head(hidden, weight, bias, of, part=part)
    expected = (*shape_of(labels), hidden.shape[-1])
    if shape_of(hidden) != expected:
        raise ValueError(f"{of}hidden: expected shape {expected}, got {shape_of(hidden)}")
    if hidden.device != labels.device:
        raise ValueError(f"{of}hidden: expected device {labels.device}, got {hidden.device}")


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, of: str, *, part: bool = False
) -> None:
    tensors = {f"{of}hidden": hidden, f"{of}weight": weight}
    if bias is not None:
        tensors[f"{of}bias"] = bias
    check_whole(**tensors)
    check_hidden(hidden, of)
    width, words = hidden.shape[-1], weight.shape[:1]
    # Not `< (not part)`: of a size that a compiler does not know, only numbers may be asked.
    fewest = 0 if part else 1
    if weight.dim() != 2 or weight.shape[0] < fewest or weight.shape[1] != width:
        raise ValueError(f"{of}weight: expected shape (V, {width}), got {shape_of(weight)}")
    if bias is not None and bias.shape != words:
        raise ValueError(f"{of}bias: expected shape {tuple(words)}, got {shape_of(bias)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected dtype float32, bfloat16 or float16, got {tensor.dtype}"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {tensor.device}")


def check_hidden(hidden: Tensor, of: str = "") -> None:
    if hidden.dim() < 1:
        raise ValueError(f"{of}hidden: expected shape (..., H), got ()")
    if hidden.shape[-1] < 1:
        raise ValueError(f"{of}hidden: expected H >= 1, got shape {shape_of(hidden)}")


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that were not left out."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_kind(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {tensor!r}")
        if tensor.is_nested or tensor.layout != torch.strided:
            kind = "nested one" if tensor.is_nested else f"{tensor.layout} one"
            raise ValueError(f"{name}: expected a dense tensor, got a {kind}")


def check_whole(**tensors: Tensor) -> None:
    check_kind(**tensors)
    for name, tensor in tensors.items():
        # By attribute: torch.distributed takes half a second to import.
        if hasattr(tensor, "placements"):
            raise ValueError(f"{name}: expected a whole tensor, got DTensor {tensor.placements}")


def check_memory(**tensors: Tensor) -> None:
    """RuntimeError for tensors that hold nothing: kernels would read at their addresses.

    Operators, which know the shapes of their results without a walk, do not get here.
    """
    made = torch.empty(0, dtype=torch.float32, device="cpu")  # what a FakeTensorMode makes of it
    for name, x in (*tensors.items(), (next(iter(tensors)), made)):
        if x.device.type == "meta" or isinstance(x, FakeTensor):
            kind = "a FakeTensor" if isinstance(x, FakeTensor) else "one on the meta device"
            raise RuntimeError(f"{name}: expected a tensor in memory, got {kind}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def shape_text(*sizes: int | str) -> str:
    """As a tuple is written, letters without quotes."""
    return f"({', '.join(map(str, sizes))})"


def check_options(
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
    budget: int | None,
    ignore_index: int | None = None,
) -> None:
    check_map(temperature, softcap, logit_scale)
    check_budget(budget)
    if ignore_index is not None:
        check_integer("ignore_index", ignore_index, "an integer or None")
    check_names("outputs", outputs, OUTPUTS)


def check_map(temperature: float, softcap: float | None, logit_scale: float, of: str = "") -> None:
    """of: what the names of one head's options begin with."""
    check_number(f"{of}temperature", temperature, "a finite number > 0", lambda x: x > 0)
    if softcap is not None:
        check_number(f"{of}softcap", softcap, "a finite number > 0 or None", lambda x: x > 0)
    check_number(f"{of}logit_scale", logit_scale, "a finite number")


def per_row(
    temperature: Any, labels: Tensor, ignore_index: int | None, name: str = "temperature"
) -> tuple[Any, Tensor | None]:
    """A number and None, or of a tensor 1.0 and 1/temperature of each token, [N] float64."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    return 1.0, each_row(temperature, labels, ignore_index, name).reciprocal_().reshape(-1)


def each_row(
    temperature: Tensor, labels: Tensor, ignore_index: int | None, name: str = "temperature"
) -> Tensor:  # float64, of the shape of `labels`
    """The temperature of each token, 1 where ignored.

    On a CPU one that is not finite and > 0 raises; elsewhere, and in a graph that is compiled, it
    makes its row NaN, unread.
    """
    check_whole(**{name: temperature})
    if not temperature.is_floating_point() or temperature.requires_grad:
        got = "one with gradient" if temperature.requires_grad else temperature.dtype
        raise ValueError(f"{name}: expected floating-point numbers without gradient, got {got}")
    if temperature.device != labels.device:
        raise ValueError(f"{name}: expected device {labels.device}, got {temperature.device}")
    if not _broadcasts(temperature, labels):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {shape_of(labels)}, "
            f"got {shape_of(temperature)}"
        )
    rows = temperature.double().expand(labels.shape)
    if ignore_index is not None:
        rows = rows.masked_fill(labels == ignore_index, 1.0)
    allowed = (rows > 0) & (rows < float("inf"))
    read = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if read and not bool(allowed.all()):
        place = tuple(x.item() for x in (~allowed).nonzero()[0])
        raise ValueError(
            f"{name}: expected finite numbers > 0, got {rows[place].item()} at token {place}"
        )
    return torch.where(allowed, rows, float("nan"))


def _broadcasts(x: Tensor, labels: Tensor) -> bool:
    sizes = zip(reversed(x.shape), reversed(labels.shape), strict=False)
    return x.dim() <= labels.dim() and all(a in (1, b) for a, b in sizes)


def check_budget(budget: Any) -> None:
    if budget is not None:
        check_integer("budget", budget, "bytes >= 0 or None", lambda x: x >= 0)


def check_number(
    name: str, value: Any, expected: str, allowed: Callable[[Any], bool] = lambda x: True
) -> None:
    """A finite number that float() takes; `allowed` says which of them."""
    if not _is_number(value) or not allowed(value):
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")


def _is_number(value: Any) -> bool:
    real, whole = isinstance(value, Real), isinstance(value, Integral)
    if isinstance(value, bool) or not real:
        return False
    # float() raises of larger integers.
    return bool(abs(value) < 2**1000 if whole else -float("inf") < value < float("inf"))


def check_integer(
    name: str,
    value: Any,
    expected: str = "an integer",
    allowed: Callable[[Any], bool] = lambda x: True,
) -> int:
    plain = isinstance(value, Integral) and not isinstance(value, bool)
    if not plain or not abs(value) < 2**63 or not allowed(value):
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")
    return int(value)


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {_shown(value)}")


def check_names(name: str, value: Any, known: tuple[str, ...]) -> None:
    """A tuple of the known names, or a list."""
    if (
        not isinstance(value, (tuple, list))
        or not value
        or not all(isinstance(one, str) and one in known for one in value)
    ):
        raise ValueError(f"{name}: expected a tuple of {', '.join(known)}, got {value!r}")


_SUMMED = {torch.float64, *DTYPES, torch.int64, torch.int32, torch.int16, torch.int8}
_SUMMED |= {torch.uint8, torch.bool}


def told_of(value: Any) -> str:
    """What processes compare of a value; of other values it is another, of any type something."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_nested and value.dtype in _SUMMED
        here = plain and value.device.type == "cpu" and not hasattr(value, "placements")
        return told_of_form(value) + (f" of checksum {_checksum(value):#x}" if here else "")
    if isinstance(value, (tuple, list)):
        told = [told_of(x) for x in value]
        # Names in any order say the same, and those of a set have another in each process.
        names = all(isinstance(x, str) for x in value)
        return f"({', '.join(sorted(told) if names else told)})"
    return repr(float(value)).removesuffix(".0") if _is_number(value) else str(value)


def told_of_form(value: Any, *, asks: bool = False, own: bool = False) -> str:
    """The same of a tensor whose values may differ, as those of hidden states in a last bit.

    asks: its gradient may be asked for. own: its rows are each process's own.
    """
    if not isinstance(value, Tensor):
        return told_of(value)
    if value.is_nested:
        return "a nested tensor"
    if own:
        return f"{value.dtype} {shape_text('...', *value.shape[-1:])}"
    asks = asks and value.requires_grad
    return f"{value.dtype} {shape_of(value)}" + (" with gradient" if asks else "")


def _checksum(x: Tensor) -> int:
    """In integers, whose sum is the same in any order."""
    x = x.detach()
    cells = x.double().view(torch.int64) if x.is_floating_point() else x.long()
    # The lower half of a short float is 0, and a product loses its upper half.
    cells = cells ^ (cells >> 32)
    places = torch.arange(1, cells.numel() + 1, dtype=torch.int64, device="cpu")
    places = places.mul_(0x9E3779B97F4A7C1).pow_(3)
    return int((cells.flatten() * places).sum()) % 2**64


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return f"a tensor of shape {shape_of(value)}; here one number is for all tokens"
        # Reading it would wait for its device, and it would get no gradient.
        return "a tensor; pass the number itself, e.g. value.item()"
    return repr(value)

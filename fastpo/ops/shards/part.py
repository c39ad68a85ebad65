"""What a process holds of a head whose words are spread over a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..walks.checks import check_integer, check_kind, given, shape_of, told_of_form
from ..walks.vocab_shard import VocabShard

# Arguments: hidden states; what each process has of its own; what else it has with own tokens.
_HIDDENS = {"hidden", "hiddens", "teacher_hidden"}
_OWN = {"weight", "weights", "teacher_weight", "bias", "biases", "teacher_bias"}
_OWN |= {"first", "vocab", "group", "budget", "backend"}
_ROWS = {"labels": torch.int64, "mask": torch.bool}


@dataclass(frozen=True)
class Part:
    weight: Tensor  # [words, H]
    bias: Tensor | None  # [words]
    shard: VocabShard


def part_of(
    weight: Tensor,
    bias: Tensor | None,
    first: int | None,
    vocab: int | None,
    group: dist.ProcessGroup | None,
    alike: Mapping[str, Any],
) -> Part:
    """first, vocab and group are told by the caller, or by the mesh of a DTensor.

    alike: what all processes have to call with alike, by name; compared on a CPU.
    """
    part = _part_of(weight, bias, first, vocab, group)
    if part.weight.device.type == "cpu":
        part.shard.check(len(part.weight), alike)
    return part


def alike_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of all arguments of a primitive those that `part_of` compares, as it does."""
    own = given.get("own_tokens") is True  # what else it may be is an error, later
    told = {"own_tokens": given.get("own_tokens")}  # what others depend on
    for name, value in given.items():
        if name in _OWN:
            continue
        if own and name in _ROWS:
            told[name] = _form_of_own(value, _ROWS[name], given["hidden"])
            continue
        if name in _HIDDENS:
            trained = name != "teacher_hidden" or given["teacher_grad"] is True
            asks = torch.is_grad_enabled() and trained
            several = isinstance(value, tuple | list)
            forms = [told_of_form(x, asks=asks, own=own) for x in (value if several else [value])]
            value = forms if several else forms[0]
        told[name] = "one per token" if own and isinstance(value, Tensor) else value
    return told


def _form_of_own(x: Any, dtype: torch.dtype, hidden: Any) -> str:
    """Of a number per own token: a process in which it is none would raise alone."""
    if not isinstance(x, Tensor) or not isinstance(hidden, Tensor):
        return f"{dtype} per token"
    fits = x.shape == hidden.shape[:-1]
    return f"{x.dtype} per token" if fits else f"{x.dtype} of shape {tuple(x.shape)}"


def _part_of(
    weight: Tensor,
    bias: Tensor | None,
    first: int | None,
    vocab: int | None,
    group: dist.ProcessGroup | None,
) -> Part:
    check_kind(weight=weight, **given(bias=bias))
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed: expected an initialised process group, got none")
    if isinstance(group, str | DeviceMesh):
        raise ValueError(f"group: expected a ProcessGroup or None, got {group!r}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected one that this process is in, got another")
    if isinstance(weight, DTensor):
        for name, value in (("first", first), ("vocab", vocab), ("group", group)):
            if value is not None:
                raise ValueError(f"{name}: expected None beside a DTensor, got {value}")
        return of_dtensor(weight, bias)
    if isinstance(bias, DTensor):
        raise ValueError("bias: expected a plain tensor beside a plain weight, got a DTensor")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (words, H), got {shape_of(weight)}")
    first, vocab = check_integer("first", first), check_integer("vocab", vocab)
    return Part(weight, bias, VocabShard(first, vocab, group))


def in_shards(weight: Tensor) -> TypeGuard[DTensor]:
    """Are its words spread over one group, and nothing else?"""
    return isinstance(weight, DTensor) and tuple(weight.placements) == (Shard(0),)


def of_dtensor(weight: DTensor, bias: Tensor | None) -> Part:
    """Words are the rows of the local tensor, in order of the mesh's processes."""
    local = _local("weight", weight), None if bias is None else _local("bias", bias)
    _check_alike(weight, bias=bias)
    mesh, vocab = weight.device_mesh, weight.shape[0]
    first = min(mesh.get_local_rank() * -(-vocab // mesh.size()), vocab)  # as torch.chunk cuts
    shard = VocabShard(first, vocab, mesh.get_group())
    return Part(*local, shard)


def beside(
    weight: Tensor, other: Tensor, other_bias: Tensor | None, of: str = "teacher_"
) -> tuple[Tensor, Tensor | None]:
    """The words here of a second head, in the shards of the first.

    of: what the names of the second head's tensors begin with.
    """
    check_kind(**{f"{of}weight": other}, **given(**{f"{of}bias": other_bias}))
    if not isinstance(weight, DTensor):
        for name, x in (("weight", other), ("bias", other_bias)):
            if isinstance(x, DTensor):
                raise ValueError(
                    f"{of}{name}: expected a plain tensor beside a plain weight, got a DTensor"
                )
        return other, other_bias
    local = _local(f"{of}weight", other)
    bias = None if other_bias is None else _local(f"{of}bias", other_bias)
    _check_alike(weight, **{f"{of}weight": other, f"{of}bias": other_bias})
    return local, bias


def _check_alike(weight: DTensor, **others: Tensor | None) -> None:
    """Compared as a whole: where only some processes found a difference, the others would wait."""
    for name, x in others.items():
        if x is None:
            continue
        assert isinstance(x, DTensor)
        if (x.device_mesh, len(x)) != (weight.device_mesh, len(weight)):
            raise ValueError(
                f"{name}: expected {len(weight)} words on {weight.device_mesh} as in weight, "
                f"got {len(x)} on {x.device_mesh}"
            )


def _local(name: str, x: Tensor) -> Tensor:
    if not in_shards(x):
        got = x.placements if isinstance(x, DTensor) else "a plain tensor"
        raise ValueError(f"{name}: expected a DTensor in (Shard(dim=0),), got {got}")
    local: Tensor = x.to_local()
    return local

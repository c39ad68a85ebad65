"""What a process holds of a head whose words are spread over a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..walks.checks import check_integer, check_kind, given, shape_of
from ..walks.vocab_shard import VocabShard


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
) -> Part:
    """first, vocab and group are told by the caller, or by the mesh of a DTensor."""
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
    shard = VocabShard(first, vocab, group)
    if weight.device.type == "cpu":
        shard.check(len(weight))
    return Part(weight, bias, shard)


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

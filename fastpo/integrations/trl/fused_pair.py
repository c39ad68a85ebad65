"""DistillationTrainer's two fused heads, taken over where TRL hands their tensors on.

`_compute_loss` reads both heads and gives their weights to `_chunked_divergence_loss`, which makes
those in shards whole, finds the valid positions, and calls `ChunkedDivergenceFunction.apply`.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ...ops.linear_divergence import DivergenceOptions
from ...ops.shards.gathered import HeadOptions
from ...ops.shards.part import in_shards
from ...ops.vocab_parallel_divergence import diverge_sharded
from ...ops.walks.mixture import Operands
from ..heads import output_layer, tensor_parallel
from ..seams.during import during
from ..seams.saying import say_once
from ..seams.seam import Make, Method, Replacement, Seam
from .head import Compact, WithOptions, unserved

_VERSIONS = ("1.16",)
_TRL = "trl.trainer.distillation_trainer"
# Where a function takes them, and where the other does.
_TENSORS = (
    "student_hidden_states",
    "student_lm_head_weight",
    "student_lm_head_bias",
    "teacher_hidden_states",
    "teacher_lm_head_weight",
    "teacher_lm_head_bias",
)
_APPLY = (
    "student_hidden",
    "student_weight",
    "student_bias",
    "teacher_hidden",
    "teacher_weight",
    "teacher_bias",
    "beta",
    "temperature",
    "student_logit_scale",
    "student_final_logit_softcapping",
    "teacher_logit_scale",
    "teacher_final_logit_softcapping",
)
_LOSS = (
    "student_hidden_states",
    "teacher_hidden_states",
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "completion_mask",
    "beta",
    "num_items_in_batch",
    "student_lm_head_bias",
    "teacher_lm_head_bias",
    "student_logit_scale",
    "teacher_logit_scale",
    "student_final_logit_softcapping",
    "teacher_final_logit_softcapping",
    "temperature",
)

Head = tuple[Tensor, Tensor | None]  # weight and bias

# Of a loss under way: student's and teacher's head, where the former lies in shards.
_heads: ContextVar[tuple[Head, Head] | None] = ContextVar("fastpo_heads", default=None)


class _Step(Method):
    """`DistillationTrainer._compute_loss`, where it cannot be right."""

    def __call__(self, trainer: Any, student: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor_parallel(output_layer(student)):
            raise RuntimeError(
                "DistillationTrainer: expected a student that is not tensor-parallel, got one that "
                "is: TRL draws other completions in each process, whose activations would be "
                "added up; GKDTrainer draws the same ones"
            )
        return self.original(trainer, student, *args, **kwargs)


class _Loss(Replacement):
    """`_chunked_divergence_loss`: heads in shards go past it as they are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self.original).bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = {name: bound.arguments[name] for name in _TENSORS}
        given = list(tensors.values())
        why = unserved(**dict(zip(_APPLY, given, strict=False)))
        if why is not None or not in_shards(given[1]):
            return self.original(*args, **kwargs)
        # What TRL is given in their place it hands on unread.
        here = {name: x.to_local() for name, x in tensors.items() if isinstance(x, DTensor)}
        with during(_heads, (tuple(given[1:3]), tuple(given[4:6]))):
            return self.original(**{**bound.arguments, **here})


class _Divergence(WithOptions):
    """`linear_divergence` behind the `apply` of TRL's autograd function."""

    def apply(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        why = self._unserved(*arguments[:6])
        if why is None:
            return self.divergence(*arguments)
        say_once("DistillationTrainer keeps its own divergence", why)
        divergence, entropy = self.original.apply(*arguments)
        return divergence, entropy

    @staticmethod
    def _unserved(*tensors: Tensor | None) -> str | None:
        # ZeRO-3 takes the weights away before the backward, which does not gather them again.
        if any(hasattr(weight, "ds_id") for weight in (tensors[1], tensors[4])):
            return "lm_head.weight: expected a whole tensor, got a shard"
        return unserved(**dict(zip(_APPLY, tensors, strict=False)))

    def divergence(
        self,
        student_hidden: Tensor,  # [N, H]
        student_weight: Tensor,  # [V, H]
        student_bias: Tensor | None,
        teacher_hidden: Tensor,  # [N, H']
        teacher_weight: Tensor,  # [V, H']
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # each [N]
        heads = _heads.get() or ((student_weight, student_bias), (teacher_weight, teacher_bias))
        options = DivergenceOptions(
            "jsd",
            beta,
            temperature=temperature,
            softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            outputs=("divergence", "entropy"),
            budget=self.own.budget,
            backend=self.own.backend,
        )
        student, teacher = map(_operands, (student_hidden, teacher_hidden), heads)
        found = diverge_sharded(student, teacher, None, options)
        assert found.divergence is not None and found.entropy is not None
        return found.divergence, found.entropy


def _operands(hidden: Tensor, head: Head) -> Operands:
    """Shards are float32 in mixed precision; in TRL, too, the head has the hidden states' dtype."""
    weight, bias = head
    if isinstance(weight, DTensor):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    return Operands(hidden, weight, bias)


def replacements(own: HeadOptions) -> dict[Seam, Make]:
    arguments = ("unwrapped_student", "inputs", "num_items_in_batch")
    made: tuple[tuple[Seam, Make], ...] = (
        (
            Seam(_TRL, "ChunkedDivergenceFunction", _APPLY, _VERSIONS, "forward", optional=True),
            partial(_Divergence, own=own),
        ),
        (Seam(_TRL, "_use_triton", ("device",), _VERSIONS, optional=True), Compact),
        (Seam(_TRL, "_chunked_divergence_loss", _LOSS, _VERSIONS, optional=True), _Loss),
        (Seam(_TRL, "DistillationTrainer._compute_loss", arguments, _VERSIONS), _Step),
    )
    return dict(made)

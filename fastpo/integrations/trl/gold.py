"""GOLD's loss across tokenizers: it sorts whole rows of probabilities, here a few at a time.

The loss is a mean over texts, in each a mean over runs of tokens that end at the same byte in both
tokenizers. TRL's own code runs on blocks of such runs; the backward makes their rows again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import planner
from ..lazy.logits import promise_of, promises
from ..seams.seam import Method


class _Span(NamedTuple):
    """A run of tokens of the student and the run of the teacher that says the same."""

    start: int
    stop: int
    teacher_start: int
    teacher_stop: int


class _Side(NamedTuple):
    """What the loss takes of the student, or of the teacher; each [B, T] or wider."""

    logits: Any
    labels: Tensor
    ids: Tensor
    offsets: Tensor | None

    def cut(self, *index: slice) -> _Side:
        offsets = None if self.offsets is None else self.offsets[index]
        return _Side(self.logits[index], self.labels[index], self.ids[index], offsets)

    def block(self, start: int, stop: int, lead: int) -> _Side:
        """Tokens start to stop alone, with real logits and `lead` rows before them."""
        part = self.cut(slice(None), slice(start - lead, stop))
        labels = torch.zeros_like(part.labels)
        labels[:, :lead] = -100
        promise = promise_of(part.logits)
        assert promise is not None
        return part._replace(logits=promise.materialize(), labels=labels)


class Sorted(Method):
    """`ULDLoss._compute_distillation_loss`."""

    def __call__(
        self,
        loss: Any,
        student_logits: Any,
        teacher_logits: Any,
        student_labels: Tensor,
        teacher_labels: Tensor,
        student_input_ids: Tensor,
        teacher_input_ids: Tensor,
        student_byte_offsets: Tensor | None = None,
        teacher_byte_offsets: Tensor | None = None,
    ) -> Any:
        student = _Side(student_logits, student_labels, student_input_ids, student_byte_offsets)
        teacher = _Side(teacher_logits, teacher_labels, teacher_input_ids, teacher_byte_offsets)
        if promises(student_logits, teacher_logits) is None:
            return self._own(loss, student, teacher)
        rows = [slice(i, i + 1) for i in range(len(student_labels))]
        texts = [(student.cut(row), teacher.cut(row)) for row in rows]
        spans = [_spans(loss, *text) for text in texts]
        # Whose tokens count is in the spans; what TRL logs of them is kept on the copy.
        bare = copy.copy(loss)
        bare.skip_student_eos = bare.skip_teacher_eos = False
        losses = [
            self._in_blocks(loss, bare, *text, own) if own else self._own(loss, *text)
            for text, own in zip(texts, spans, strict=True)
        ]
        return torch.stack([x.sum() for x in losses]).mean()

    def _own(self, loss: Any, student: _Side, teacher: _Side) -> Tensor:
        found: Tensor = self.original(loss, *chain(*zip(student, teacher, strict=True)))
        return found

    def _in_blocks(
        self, loss: Any, bare: Any, student: _Side, teacher: _Side, spans: list[_Span]
    ) -> Tensor:
        lead = int(loss.token_merge_strategy == "bayesian")  # there a row predicts the next token
        total, logged = (
            torch.zeros((), dtype=torch.float32, device=student.labels.device),
            [0.0, 0.0],
        )
        names = ("last_matched_loss", "last_unmatched_loss")
        for block in _blocks(spans, _rows(student.logits, teacher.logits)):
            first, last = block[0], block[-1]

            def part(first: _Span = first, last: _Span = last) -> Tensor:
                return self._own(
                    bare,
                    student.block(first.start, last.stop, lead),
                    teacher.block(first.teacher_start, last.teacher_stop, lead),
                )

            share = len(block) / len(spans)
            total = total + share * checkpoint(part, use_reentrant=False, preserve_rng_state=False)
            if hasattr(bare, names[0]):
                parts = (getattr(bare, name).detach() for name in names)
                logged = [so_far + share * x for so_far, x in zip(logged, parts, strict=True)]
        if hasattr(bare, names[0]):
            for name, value in zip(names, logged, strict=True):
                setattr(loss, name, value)
        return total


def _spans(loss: Any, student: _Side, teacher: _Side) -> list[_Span]:
    """What the loss compares in one text, in its order."""
    (start,), (size,) = loss._get_start_and_size_answers(student.labels)
    (teacher_start,), (teacher_size,) = loss._get_start_and_size_answers(teacher.labels)
    size, teacher_size = size - loss.skip_student_eos, teacher_size - loss.skip_teacher_eos
    if min(size, teacher_size) <= 0:
        return []
    if not loss.use_extended_uld:
        pairs = [([k], [k]) for k in range(min(size, teacher_size))]
    elif student.offsets is None or teacher.offsets is None:
        return []  # the loss says what is missing
    else:
        offsets = student.offsets[0, start : start + size].tolist()
        teacher_offsets = teacher.offsets[0, teacher_start : teacher_start + teacher_size].tolist()
        groups = loss._align_by_byte_offsets(offsets, teacher_offsets)
        pairs = [(own, other) for own, other in zip(*groups, strict=False) if own and other]
    spans = [
        _Span(
            start + own[0],
            start + own[-1] + 1,
            teacher_start + other[0],
            teacher_start + other[-1] + 1,
        )
        for own, other in pairs
    ]
    # Nothing predicts the first token of a row.
    unscored = loss.token_merge_strategy == "bayesian" and not (start and teacher_start)
    return spans[1:] if unscored else spans


def _rows(student: Tensor, teacher: Tensor) -> int:
    """Tokens of a block: their logits fill a tile."""
    words = max(student.shape[-1], teacher.shape[-1])
    tile = planner.tile_shape(student.shape[:-1].numel(), words, student.device.type)
    return tile.tokens * tile.vocab // words


def _blocks(spans: list[_Span], rows: int) -> Iterator[list[_Span]]:
    """Neighbours, of at most `rows` tokens of either side where there is more than one."""
    block = spans[:1]
    for span in spans[1:]:
        first = block[0]
        if max(span.stop - first.start, span.teacher_stop - first.teacher_start) > rows:
            yield block
            block = []
        block.append(span)
    yield block

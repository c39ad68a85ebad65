"""TRL's trainers that build logits: while they compute log-probabilities, the head is lazy.

One seam per trainer, the method that calls the model and reads its logits, and the helpers it
reads them with. What they compute stays theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...ops.shards.gathered import HeadOptions
from ..lazy import ddp
from ..lazy.head import lazy_head
from ..lazy.logits import LazyLogits, promise_of, promised
from ..lazy.promise import OWN, Promise
from ..seams.seam import Make, Method, Replacement, Seam
from ..seams.wrappers import bare


class Reader(Method):
    """A method that calls `model`, and perhaps others of the trainer, and reads their logits."""

    others: tuple[str, ...] = ()  # attributes of the trainer

    def shards(self, trainer: Any) -> bool:
        """Does the method read the same of the logits on every process, whatever its batch holds?
        Then heads in shards stay in them."""
        return False

    def __init__(
        self, original: Any, options: HeadOptions = OWN, sharing: bool | None = None
    ) -> None:
        super().__init__(original)
        self.options, self.sharing = options, sharing

    def __call__(self, trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lazy(trainer, model):
            return real_outputs(self.original(trainer, model, *args, **kwargs))

    @contextmanager
    def lazy(self, trainer: Any, model: Any) -> Iterator[None]:
        from ..sharing.backbone import packing  # imports transformers

        models = [model, *(getattr(trainer, name, None) for name in self.others)]
        with ExitStack() as stack:
            for one in models:
                if one is None:
                    continue
                inner = bare(trainer.accelerator.unwrap_model(one))  # of DDP, too
                who, shards = type(trainer).__name__, self.shards(trainer)
                stack.enter_context(lazy_head(who, inner, self.options, shards))
                if self.sharing is not None:
                    stack.enter_context(packing(inner, self.sharing))
            yield


def real_outputs(result: Any) -> Any:
    """Outputs that a trainer hands out outlive a call; in evaluation perhaps nobody reads them."""
    if not isinstance(result, tuple) or len(result) != 2:
        return result
    outputs = result[1]
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, LazyLogits) and torch.is_grad_enabled():
        # With their graph: a script may add a loss of its own. Few enough to be computed, they may
        # be read after the step, too, which of others is an error, as the weights have changed.
        outputs.logits = logits + 0
    elif (promise := promise_of(logits)) is not None:
        # Of a head in shards, gathered here: perhaps one process alone reads them.
        outputs.logits = promised(promise)
    return result


class Predictor(Reader):
    """`prediction_step` of a trainer on the fused head, which runs the model again for logits."""

    def __call__(self, trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.preprocess_logits_for_metrics is None:  # the caller's metrics want them all
            return self.original(trainer, model, *args, **kwargs)
        with self.lazy(trainer, model):
            return self.original(trainer, model, *args, **kwargs)


class _Smoothed(Reader):
    """SFT's `compute_loss`: it builds logits for label smoothing and a loss of the user's."""

    def __call__(self, trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self.arguments(trainer, model, *args, **kwargs)
        logits = trainer.label_smoother is not None or trainer.compute_loss_func is not None
        if logits and not bound.get("return_outputs"):
            return super().__call__(trainer, model, *args, **kwargs)
        return self.original(trainer, model, *args, **kwargs)


class _BatchLogps(Replacement):
    """`get_batch_logps`: its own labels say which positions count."""

    def __call__(
        self,
        logits: Any,
        labels: Tensor,
        average_log_prob: bool = False,
        is_encoder_decoder: bool = False,
    ) -> Any:
        promise = promise_of(logits)
        if promise is not None:
            scored = labels != -100
            # The row before a label predicts it; the last one predicts nothing. Decoders of an
            # encoder are fed shifted ids instead.
            logits = promised(promise.only(scored if is_encoder_decoder else scored.roll(-1, 1)))
        return self.original(logits, labels, average_log_prob, is_encoder_decoder)


class Selected(Replacement):
    """`selective_log_softmax`."""

    def __call__(
        self,
        logits: Any,
        index: Tensor,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> Any:
        promise = promise_of(logits) if index.ndim == logits.ndim - 1 else None
        if promise is None:
            return self.original(logits, index, temperature, row_mask)
        return _masked(promise, row_mask, temperature).logps(index)


class SelectedWithEntropy(Replacement):
    """`selective_log_softmax_and_entropy`."""

    def __call__(
        self,
        logits: Any,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> Any:
        promise = promise_of(logits)
        if promise is None:
            return self.original(logits, index, entropy_requires_grad, temperature, row_mask)
        stats = _masked(promise, row_mask, temperature).stats(index, "entropy")
        entropy = stats.entropy
        assert entropy is not None
        return stats.logps, entropy if entropy_requires_grad else entropy.detach()


class _Supports(Replacement):
    """TRL's Triton kernel over logits reads their memory; its plain path asks for what it needs."""

    def __call__(self, logits: Any, *args: Any, **kwargs: Any) -> bool:
        return not isinstance(logits, LazyLogits) and self.original(logits, *args, **kwargs)


def _masked(logits: Promise, row_mask: Tensor | None, temperature: float) -> Promise:
    tempered: Promise = logits if temperature == 1 else logits.scaled(1 / temperature)
    return tempered if row_mask is None else tempered.only(row_mask != 0)


_SINCE_13 = ("1.13", "1.14", "1.15", "1.16")
_SINCE_14, _SINCE_15 = _SINCE_13[1:], _SINCE_13[2:]
SELECT = ("logits", "index", "temperature", "row_mask")
SELECT_BOTH = ("logits", "index", "entropy_requires_grad", "temperature", "row_mask")
LOSS = ("model", "inputs", "return_outputs")
_PREDICT = ("model", "inputs", "prediction_loss_only", "ignore_keys")
_LOGPS = ("labels", "average_log_prob", "is_encoder_decoder")
_SEQUENCE = ("model", "input_ids", "attention_mask", "logits_to_keep")
_VISION = ("completion_ids", "completion_mask", "vision_inputs")
# versions, module, name, parameters, what stands in
Row = tuple[tuple[str, ...], str, str, tuple[str, ...], Make]
_TABLE: tuple[Row, ...] = (
    (_SINCE_13, "cpo", "CPOTrainer.concatenated_forward", ("model", "batch"), Reader),
    (_SINCE_13, "cpo", "CPOTrainer.get_batch_logps", _LOGPS, _BatchLogps),
    (_SINCE_14, "cpo", "selective_log_softmax", SELECT, Selected),
    (_SINCE_13, "orpo", "ORPOTrainer.concatenated_forward", ("model", "batch"), Reader),
    (_SINCE_13, "orpo", "ORPOTrainer.get_batch_logps", _LOGPS, _BatchLogps),
    (_SINCE_14, "orpo", "selective_log_softmax", SELECT, Selected),
    (_SINCE_13, "tpo", "TPOTrainer._compute_loss", LOSS, Reader),
    (_SINCE_14, "tpo", "selective_log_softmax_and_entropy", SELECT_BOTH, SelectedWithEntropy),
    (_SINCE_13, "a2po", "A2POTrainer._get_sequence_logps", _SEQUENCE, Reader),
    (_SINCE_14, "a2po", "selective_log_softmax", SELECT, Selected),
    (
        _SINCE_13,
        "online_dpo",
        "OnlineDPOTrainer._forward",
        ("model", "prompt_ids", "prompt_mask", *_VISION),
        Reader,
    ),
)


def seams(table: Iterable[Row], package: str = "trl.experimental.{}") -> dict[Seam, Make]:
    """The rows of a table as seams; `package` holds the modules `<name>_trainer`."""
    return {
        Seam(f"{package.format(module)}.{module}_trainer", name, parameters, versions): make
        for versions, module, name, parameters, make in table
    }


def with_options(
    made: Mapping[Seam, Make], options: HeadOptions, sharing: bool | None
) -> dict[Seam, Make]:
    """The same, readers with budget and backend, and whether they pack their batches."""

    def chosen(make: Any) -> Make:
        reads = isinstance(make, type) and issubclass(make, Reader)
        return functools.partial(make, options=options, sharing=sharing) if reads else make

    return {seam: chosen(make) for seam, make in made.items()}


def replacements() -> dict[Seam, Make]:
    arguments = (*LOSS, "num_items_in_batch")
    sft = Seam("trl.trainer.sft_trainer", "SFTTrainer.compute_loss", arguments, _SINCE_15)
    supports = Seam(
        "trl.trainer.utils",
        "_supports_trl_loss_kernel",
        ("logits", "index", "row_mask"),
        _SINCE_14,
        optional=True,
    )
    predictors = [
        Seam(
            f"trl.trainer.{name}_trainer",
            f"{name.upper()}Trainer.prediction_step",
            _PREDICT,
            _SINCE_15,
        )
        for name in ("sft", "dpo", "kto")
    ]
    return {
        **seams(_TABLE),
        **ddp.replacements(),
        sft: _Smoothed,
        supports: _Supports,
        **dict.fromkeys(predictors, Predictor),
    }

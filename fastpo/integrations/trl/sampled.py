"""GRPO and RLOO over the words their sampler kept: one support for old, reference and policy.

With top-k, top-p or min-p the sampler drew from a renormalised softmax over fewer words. Scored
over all of them every ratio is off by the mass it kept. What was kept is fixed when a batch is
generated: as the sampler reported it ("sampling_mask" of a rollout function, a list of word ids for
each token), or by the rule of the trainer's own config and the policy as it was then. It travels
with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...mismatch import diagnose
from ...ops.shards.gathered import HeadOptions
from ...ops.stats import TokenStats
from ...ops.support.score import kept_words, score_over
from ...ops.support.words import Rule, Support
from ..seams.during import during
from ..seams.seam import Make, Method, Replacement, Seam

_VERSIONS = ("1.15", "1.16")
_LOSS = ("model", "inputs", "return_outputs", "num_items_in_batch")
_REPORTED = "sampling_mask"
_COLUMN = "fastpo_support"
_OLD = "old_per_token_logps"
_METRIC = "fastpo/sampler_"
_RULE = ("top_k", "top_p", "min_p")
# What `_get_per_token_logps_and_entropies` takes, since 1.13.
SCORES = (
    "model",
    "input_ids",
    "attention_mask",
    "logits_to_keep",
    "batch_size",
    "compute_entropy",
    "compute_aux_loss",
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


# Of hidden [N, H], weight [V, H], bias [V], targets [N].
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, HeadOptions]


@dataclass
class Replay:
    """Words of all tokens that the head will be asked for, in its order."""

    words: Support
    done: int = 0

    def score(self, operands: Operands, gather: Any, adapter: Any) -> TokenStats:
        count = len(operands[3])  # of targets
        own = self.words[self.done : self.done + count]
        self.done += count
        return score_over(own, "error", *operands, gather=gather, adapter=adapter)

    def finish(self) -> None:
        if self.done != len(self.words):
            raise RuntimeError(
                f"fastpo.patch: expected a head for each of {len(self.words)} sampled tokens, "
                f"got {self.done} tokens"
            )


@dataclass
class Record:
    """The words that a rule keeps now, and the one that was drawn: found, scored and remembered.

    mass: their probability among all words, as they were found.
    """

    rule: Rule
    found: list[Support] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)

    def score(self, operands: Operands, gather: Any, adapter: Any) -> TokenStats:
        own, mass = kept_words(self.rule, *operands, gather=gather, adapter=adapter)
        self.found.append(own)
        self.mass.append(mass)
        return score_over(own, "error", *operands, gather=gather, adapter=adapter)


_over: ContextVar[Replay | Record | None] = ContextVar("fastpo_support", default=None)


def scored(operands: Operands, gather: Any, adapter: Any) -> TokenStats | None:
    """Over the words in force; None: over all."""
    over = _over.get()
    return None if over is None else over.score(operands, gather, adapter)


@contextmanager
def _scoring(over: Replay | Record | None) -> Iterator[None]:
    with during(_over, over):
        yield
        if isinstance(over, Replay):
            over.finish()


@dataclass
class _Batch:
    """What is known of a batch.

    rows: words of each row's tokens that count, once somebody has found them.
    mass: the probability of these words, of the same tokens, where the policy's pass found them.
    reference: makes the policy the reference, which is the same model with other adapters.
    """

    rows: list[Support] | None = None
    mass: Tensor | None = None
    reference: Callable[[], AbstractContextManager[Any]] | None = None


_batch: ContextVar[_Batch | None] = ContextVar("fastpo_sampled_batch", default=None)


@contextmanager
def _of(batch: _Batch) -> Iterator[_Batch]:
    with during(_batch, batch):
        yield batch


class _Generates(Method):
    """`_generate_and_score_completions`: its batch carries the words it was drawn from."""

    def __call__(self, trainer: Any, inputs: Any) -> Any:
        with _of(_Batch()) as batch:
            output = self.original(trainer, inputs)
        if batch.rows is not None:
            output[_COLUMN] = batch.rows
        _log_mass(trainer, batch, output)
        _log(trainer, output)
        return output


class _Samples(Method):
    """`_generate`: what the sampler reports of its words."""

    def __call__(self, trainer: Any, prompts: Any) -> Any:
        output = self.original(trainer, prompts)
        batch = _batch.get()
        for part in output:
            if batch is not None and isinstance(part, dict) and _REPORTED in part:
                device = trainer.accelerator.device
                batch.rows = [Support.of(row, device) for row in part[_REPORTED]]
        return output


class _Loss(Method):
    """`compute_loss`, whosever `_compute_loss` it calls: the policy's pass, over what the batch
    carries."""

    def __call__(
        self, trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        with _of(_Batch(inputs.get(_COLUMN))) as batch:
            loss = self.original(trainer, model, inputs, *args, **kwargs)
        _log_mass(trainer, batch, inputs)
        return loss


class _Scores(Method):
    """`_get_per_token_logps_and_entropies` of policy or reference."""

    def __call__(
        self,
        trainer: Any,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *arguments: Any,
        **named: Any,
    ) -> Any:
        given = model, input_ids, attention_mask, logits_to_keep, *arguments
        run = partial(self.original, trainer, *given, **named)
        rule = _rule(trainer)
        batch = _batch.get()
        if batch is None:
            return run()
        adapter = batch.reference or nullcontext
        if batch.rows is None and rule == Rule():  # all words
            with adapter():
                return run()
        sizes = attention_mask[:, -logits_to_keep:].sum(1).tolist()
        if batch.rows is None and (batch.reference or model is trainer.ref_model):
            # The reference is asked first: what was kept is the policy's own choice.
            policy = partial(self.original, trainer, trainer.model, *given[1:], **named)
            self._record(policy, rule, batch, sizes)
        if batch.rows is None:
            return self._record(run, rule, batch, sizes)
        with adapter(), _scoring(Replay(_words(batch.rows, sizes))):
            return run()

    def _record(self, run: Any, rule: Rule, batch: _Batch, sizes: list[int]) -> Any:
        record = Record(rule)
        with _scoring(record):
            results = run()
        batch.rows = Support.cat(record.found).split(sizes)
        batch.mass = torch.cat(record.mass)
        return results


class _Adapter(Replacement):
    """`use_adapter`, put off until the policy has been asked for its words."""

    @contextmanager
    def __call__(self, model: Any, adapter_name: str | None) -> Iterator[None]:
        batch = _batch.get()
        if batch is None or batch.rows is not None:
            with self.original(model, adapter_name):
                yield
            return
        batch.reference = partial(self.original, model, adapter_name)
        try:
            yield
        finally:
            batch.reference = None


def _log_mass(trainer: Any, batch: _Batch, output: dict[str, Any]) -> None:
    """What the sampler's rule has kept of the policy, where its words were found just now."""
    if batch.mass is None:
        return
    sampled = _sampled(output)[output["completion_mask"] != 0]
    if bool(sampled.any()):
        _add(trainer, {f"{_METRIC}kept_mass": float(batch.mass[sampled].double().mean())})


def _log(trainer: Any, output: dict[str, Any]) -> None:
    """How far the policy is from what the sampler says of itself, where both are there."""
    sampler, own = (output.get(name) for name in ("sampling_per_token_logps", _OLD))
    if sampler is None or own is None:
        return
    mask = _sampled(output) & ~sampler.isnan()  # NaN: an engine that does not know
    if bool(mask.any()):
        _add(trainer, diagnose(sampler, own, mask=mask).log(_METRIC))


def _sampled(output: dict[str, Any]) -> Tensor:  # [B, T] bool
    """Tokens that no tool has written."""
    mask: Tensor = output["completion_mask"] != 0
    return mask if "tool_mask" not in output else mask & (output["tool_mask"] != 0)


def _add(trainer: Any, numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        trainer._metrics["train" if trainer.model.training else "eval"][name].append(value)


def _words(rows: list[Support], sizes: list[int]) -> Support:
    got = [len(row) for row in rows]
    # Of a row that is masked whole, as `mask_truncated_completions` masks some, nothing is scored.
    fits = len(got) == len(sizes) and all(
        size in (0, n) for size, n in zip(sizes, got, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{_REPORTED}: expected a list of word ids for each of {sizes} tokens of the "
            f"completions, got {got}"
        )
    return Support.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])


def _rule(trainer: Any) -> Rule:
    """Of the config; TRL lets its `generation_kwargs` override the options of the same names."""
    given = trainer.args.generation_kwargs or {}
    options = {name: given.get(name, getattr(trainer, name)) for name in _RULE}
    return Support.rule(**options)


def replacements() -> dict[Seam, Make]:
    made: dict[Seam, Make] = {}
    for name, trainer in (("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer")):
        methods: dict[tuple[str, tuple[str, ...]], Make] = {
            ("_generate_and_score_completions", ("inputs",)): _Generates,
            ("_generate", ("prompts",)): _Samples,
            ("compute_loss", _LOSS): _Loss,
            ("_get_per_token_logps_and_entropies", SCORES): _Scores,
        }
        module = f"trl.trainer.{name}_trainer"
        for (method, parameters), make in methods.items():
            made[Seam(module, f"{trainer}.{method}", parameters, _VERSIONS)] = make
        made[Seam(module, "use_adapter", ("model", "adapter_name"), _VERSIONS)] = _Adapter
    return made

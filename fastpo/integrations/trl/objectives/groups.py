"""`GroupTrainer`: objectives over several scored completions of one prompt, on TRL's DPOTrainer."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from ....objectives._math import group_max, group_sum
from ....ops.walks.checks import check_flag
from ....quantities import Quantities, padded
from ...seams.seam import fitting
from . import by_name
from .base import TEMPLATE, TextTrainer
from .columns import SINGLES, Carry
from .needs import Term, default_of, of_family, refuse_unheard, total
from .passes import Pass
from .setting import Objective, Setting

# Options of DPOConfig that groups have no use for.
_OF_PAIRS = (
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "use_weighting",
    "f_divergence_type",
    "precompute_ref_log_probs",
)
_TOKENS = ("prompt_ids", "completion_ids")
# TRL's collator takes pairs: a completion stands on both sides, and one is thrown away.
_PAIR_KEYS = {
    "prompt_ids": "prompt_ids",
    "chosen_ids": "completion_ids",
    "rejected_ids": "completion_ids",
}


class GroupTrainer(TextTrainer, DPOTrainer):
    """TRL's DPOTrainer for groups: a prompt, several completions, and numbers for each of them.

    objective: a key of the family groups, that key bound to hyperparameters by
        `fastpo.objectives.get`, or a function of quantities that returns a row per group.
    train_dataset, eval_dataset: map-style, with columns `prompt`, `completions` (a list of texts
        or of message lists) and those of the quantities' names that the objective asks for
        (`scores`, `labels`, `ref_logps`, ...): lists with a number per completion. Groups may
        differ in size.
    reference_free: log-ratios are log-probabilities.

    All else is DPOTrainer's; a batch counts groups. The reference model is loaded, and runs, only
    when the objective asks for it. Metrics: rewards are β times the log-ratio; `rewards/margins`
    that of the best scored completion less that of the others, `rewards/accuracies` how often
    the best scored one's is above all others'. Both are of the groups whose scores differ, and
    are not logged where there are none.

    Raises ValueError for an objective of another family, a missing column, a list of another
    length than `completions`, options of DPOConfig that are about pairs, and `compute_metrics`.
    """

    own = ()
    families = ("groups",)
    sides = SINGLES
    compute_loss = DPOTrainer.compute_loss  # a subclass may have a loss of its own

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *,
        objective: str | Objective,
        train_dataset: Any,
        reference_free: bool = False,
        **kwargs: Any,
    ) -> None:
        check_flag("reference_free", reference_free)
        setting = Setting(objective, reference_free=reference_free)
        fitting(by_name.replacements(setting))  # raises where TRL has no fused head
        term = Term(of_family(setting.bound(), self.families))
        if not isinstance(args, DPOConfig):
            got = None if args is None else type(args).__name__
            raise ValueError(f"args: expected a DPOConfig, got {got}")
        for name in _OF_PAIRS:
            if (got := getattr(args, name)) != default_of(args, name):
                raise ValueError(f"{name}: expected it unset for groups, got {got!r}")
        if kwargs.get("compute_metrics") is not None and not args.prediction_loss_only:
            raise ValueError(
                "compute_metrics: expected none, or prediction_loss_only=True, for groups, which "
                "have no logits to return, got one"
            )
        heard = {"beta": term.beta} | term.parameters
        refuse_unheard(args, term, heard, "fastpo.objectives.get")
        self.prepare_objective([term], [], setting, train_dataset)
        if images := self._fastpo.images:
            raise ValueError(f"train_dataset: expected texts alone for groups, got {min(images)!r}")
        with self.configured(args):
            super().__init__(model, ref_model, args, train_dataset=train_dataset, **kwargs)
        self.finish_objective()

    def carrying(self, collator: Any) -> GroupCollator:
        if isinstance(collator, GroupCollator):
            return collator
        # Which completions are a group's is known: a column of that name is of something else.
        names = [name for name in self._fastpo.needs.columns() if name != "groups"]
        return GroupCollator(collator, names)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        # PyTorch gives iterable ones a __getitem__, but no length.
        if not all(hasattr(dataset, needed) for needed in ("__len__", "column_names")):
            got = type(dataset).__name__
            raise ValueError(f"dataset {name!r}: expected a map-style datasets.Dataset, got {got}")
        columns = dataset.column_names
        if not {"prompt", "completions"} <= set(columns):
            got = ", ".join(columns)
            raise ValueError(
                f"dataset {name!r}: expected columns prompt and completions, got {got}"
            )
        self._note_columns(name, tuple(columns))
        whole = copy.copy(args)
        whole.max_length = None  # TRL would drop single completions
        rows = dataset.map(_pairs_of, batched=True, with_indices=True, remove_columns=columns)
        tokens = DPOTrainer._prepare_dataset(self, rows, processing_class, whole, name)
        ends = list(itertools.accumulate(map(len, dataset["completions"])))

        def own(row: Mapping[str, Any], i: int) -> dict[str, Any]:
            part = tokens[ends[i] - len(row["completions"]) : ends[i]]
            return {"prompt_ids": part["prompt_ids"], "completion_ids": part["chosen_ids"]}

        dataset = dataset.map(own, with_indices=True)
        limit = args.max_length
        if limit is None or args.truncation_mode != "keep_start":
            return dataset
        return dataset.filter(lambda row: all(len(ids) < limit for ids in row["prompt_ids"]))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        trainer: Any = self
        trainer._signature_columns += [n for n in _TOKENS if n not in trainer._signature_columns]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        # `predict` wants logits, of which groups have none.
        loss, *_ = super().prediction_step(model, inputs, True, ignore_keys)
        return loss, None, None

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        if return_outputs:
            raise ValueError("return_outputs: expected False, groups have no logits to return")
        own = {key: inputs[key] for key in ("input_ids", "attention_mask", "completion_mask")}
        given = {name: inputs[name] for name in self._fastpo.needs.columns() if name in inputs}
        given["groups"] = inputs["groups"]
        if self._runs_reference(inputs):
            run, sums = self._reference(own, {})
            given = {"ref_token_logps": run.logps, "ref_logps": torch.cat(sums)} | given
        policy = Pass(model)
        output = policy(**self._arguments(own))
        free = self._fastpo.setting.reference_free
        q = padded(policy.stats, policy.mask, sides=("",), reference_free=free) | given
        count = len(inputs["group_sizes"])
        function = self._fastpo.terms[0].function
        counts = "num_groups" in inspect.signature(function).parameters
        loss = total(self._fastpo.terms, q, **({"num_groups": count} if counts else {}))
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output.aux_loss
        self._log_groups(q, inputs, count)
        return loss

    def _arguments(self, own: Mapping[str, Tensor]) -> dict[str, Any]:
        arguments: dict[str, Any] = {key: own[key] for key in ("input_ids", "attention_mask")}
        arguments["labels"] = own["input_ids"].masked_fill(own["completion_mask"] == 0, -100)
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        return arguments | {"use_cache": False, "fused_lm_head": True}

    @torch.no_grad()
    def _log_groups(self, q: Quantities, inputs: Mapping[str, Any], count: int) -> None:
        policy, mask = q["logps"], q["mask"]
        rewards = self._fastpo.terms[0].beta * q["logratios" if "logratios" in q else "logps"]
        rows = rewards.new_tensor(len(rewards))
        # Sums, and of how many: processes differ in both.
        values = {
            "entropy": ((q["entropy"] * mask).sum(), mask.sum()),
            "logps/mean": (policy.sum(), rows),
            "rewards/mean": (rewards.sum(), rows),
        }
        if "scores" in q:
            groups, sizes = inputs["groups"], inputs["group_sizes"]
            values |= _ranking(rewards, q["scores"].float(), groups, sizes, count)
        # One collective and one transfer for all of them.
        numbers = torch.stack([torch.stack(value) for value in values.values()])
        totals = self.accelerator.gather(numbers.unsqueeze(0)).sum(0).tolist()
        trainer: Any = self
        mode = "train" if trainer.model.training else "eval"
        for name, (number, of) in zip(values, totals, strict=True):
            if of:
                self._metrics[mode][name].append(number / of)


def _ranking(
    rewards: Tensor, scores: Tensor, groups: Tensor, sizes: Tensor, count: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """How well the rewards know the best scored completion of each group that has worse ones."""
    best = scores == group_max(scores, groups, count)[groups]
    several = group_sum(best.float(), groups, count)
    ranked = several < sizes
    mean = group_sum(rewards * best, groups, count) / several
    rest = group_sum(rewards * ~best, groups, count) / (sizes - several).clamp(min=1)
    top, other = (
        group_max(torch.where(members, rewards, -torch.inf), groups, count)
        for members in (best, ~best)
    )
    number = ranked.sum().float()
    return {
        "rewards/accuracies": (((top > other) & ranked).sum().float(), number),
        "rewards/margins": (torch.where(ranked, mean - rest, 0).sum(), number),
    }


def _pairs_of(batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
    """TRL tokenizes pairs: each completion stands on both sides."""
    for row, completions in zip(rows, batch["completions"], strict=True):
        if not isinstance(completions, list) or not completions:
            raise ValueError(
                f"completions: expected a list of one or more texts in row {row}, "
                f"got {completions!r:.60}"
            )
    texts = [text for completions in batch["completions"] for text in completions]
    shared = {
        name: [
            value
            for value, completions in zip(batch[name], batch["completions"], strict=True)
            for _ in completions
        ]
        for name in ("prompt", *TEMPLATE)
        if name in batch
    }
    return shared | {"chosen": texts, "rejected": list(texts)}


class GroupCollator(Carry):
    """TRL's collator over all completions of a batch of groups, and their columns beside it."""

    def __init__(self, collator: Any, columns: Sequence[str]) -> None:
        super().__init__(self._singles, columns, SINGLES)
        self.pairs = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = [*_TOKENS, *(name for name in self.columns if name in examples[0])]
        for example in examples:
            for name in names:
                _check_column(name, example)
        rows = [
            dict(zip(names, values, strict=True))
            for example in examples
            for values in zip(*(example[name] for name in names), strict=True)
        ]
        batch = super().__call__(rows)
        place: Any = {"dtype": torch.int64, "device": batch["input_ids"].device}
        sizes = torch.tensor([len(example["completion_ids"]) for example in examples], **place)
        groups = torch.arange(len(examples), **place).repeat_interleave(sizes)
        return batch | {"group_sizes": sizes, "groups": groups}

    def _singles(self, rows: list[Any]) -> dict[str, Any]:
        pairs = [{key: row[source] for key, source in _PAIR_KEYS.items()} for row in rows]
        return {key: value[: len(rows)] for key, value in self.pairs(pairs).items()}


def _check_column(name: str, example: Mapping[str, Any]) -> None:
    values, expected = example[name], len(example["completion_ids"])
    if not isinstance(values, list) or len(values) != expected:
        got = len(values) if isinstance(values, list) else repr(values)
        raise ValueError(f"{name}: expected {expected} values, one per completion, got {got}")

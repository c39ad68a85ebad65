"""What fastpo's objectives add to a TRL trainer; to one of texts: columns, texts, references."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ....quantities import Quantities
from .columns import ROWS, TEXTS, Carry
from .needs import Needs, Setting, Term, total
from .passes import Pass

Texts = dict[str, dict[str, Tensor]]  # "third" -> the rows of the batch's third texts


@contextmanager
def standing_in(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of a trainer or a config that TRL reads, for the length of one call."""
    before = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(before)


class ObjectiveTrainer:
    """What all trainers share. Everything not defined here is TRL's."""

    own: tuple[str, ...]  # TRL's loss types
    families: tuple[str, ...]
    sides: Mapping[str, str]  # side of a quantity -> the tokens of TRL's example it lies along

    def prepare_objective(
        self, terms: list[Term], own: list[tuple[str, float]], setting: Setting, dataset: Any
    ) -> None:
        """Before TRL's constructor."""
        self.terms, self.own_terms, self.setting = terms, own, setting
        self.needs = Needs.of(terms, tuple(self.sides), setting)
        self.dataset_columns = () if dataset is None else tuple(next(iter(dataset)))

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """Around TRL's constructor."""
        yield

    def finish_objective(self) -> None:
        """After TRL's constructor."""


class TextTrainer(ObjectiveTrainer):
    """Trainers on texts of a dataset: columns, further texts, references."""

    @property
    def needs_reference(self) -> bool:
        return bool(self.own_terms) or self.needs.reference(self.dataset_columns)

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """TRL's constructor loads no reference model where none is asked for."""
        precompute = config.precompute_ref_log_probs
        self.precompute = precompute and self.needs_reference
        images = {"image", "images"} & set(self.dataset_columns)
        none = precompute or not (self.needs_reference or images)
        with standing_in(config, precompute_ref_log_probs=none):
            yield

    def finish_objective(self) -> None:
        """After TRL's constructor."""
        trainer: Any = self
        trainer.precompute_ref_logps = self.precompute
        trainer.data_collator = self.carrying(trainer.data_collator)
        self.other_models = {
            name: [self._frozen(one) for one in self.setting.models(name)]
            for name in self.setting.references
        }

    def _frozen(self, model: Any) -> Any:
        """A further reference model, with TRL's fused head, on this process's device."""
        trainer: Any = self
        # Under the trainer's name for it, where ours may stand, which shares prompts.
        from trl.trainer.dpo_trainer import add_fused_lm_head

        add_fused_lm_head(model.requires_grad_(False).eval())
        return trainer.accelerator.prepare_model(model, evaluation_mode=True)

    def carrying(self, collator: Any) -> Carry:
        """The collator, and the columns and texts the objective asks for."""
        if isinstance(collator, Carry):
            return collator
        names = [name for name in self.needs.columns() if name in self.dataset_columns]
        texts = [text for text in TEXTS if self.needs.text(text)]
        prompts = self.setting.score_prompts
        return Carry(collator, names, self.sides, texts=texts, score_prompts=prompts)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        prepare = super()._prepare_dataset  # type: ignore[misc]
        for text in TEXTS:
            if self.needs.text(text):
                dataset = tokenized_text(text, dataset, prepare, processing_class, args)
        dataset = prepare(dataset, processing_class, args, name)
        self.dataset_columns = tuple(next(iter(dataset)))
        self.needs.check(self.dataset_columns)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        trainer: Any = self
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        ours = [*self.needs.columns(), *(f"{t}_{k}" for t in TEXTS for k in ("ids", "prompt_ids"))]
        known = trainer._signature_columns
        known += [name for name in ours if name not in known]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        trainer: Any = self
        if not self.precompute:
            return dataset
        collator = trainer.data_collator
        trainer.data_collator = self.carrying(collator)  # masks count here, too
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]
        finally:
            trainer.data_collator = collator

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Texts]:
        """TRL's inputs, the columns, and the rows of further texts."""
        columns = {name: inputs[name] for name in self.needs.columns() if name in inputs}
        texts = {
            text: {key: inputs[f"{text}_{key}"] for key in ROWS}
            for text in TEXTS
            if f"{text}_input_ids" in inputs
        }
        foreign = {*columns, *(f"{text}_{key}" for text in texts for key in ROWS)}
        own = {name: value for name, value in inputs.items() if name not in foreign}
        kept = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps")
        return own | {name: inputs[name] for name in kept if name in inputs}, columns, texts

    def _reference(self, own: Mapping[str, Any], texts: Texts) -> tuple[Pass, Any]:
        """TRL's own reference pass: tokens, and what TRL makes of them."""
        trainer: Any = self
        run = Pass(trainer.ref_model or trainer.model, list(texts.values()))
        return run, trainer.compute_ref_log_probs(run, own)

    def _add(self, result: Any, q: Quantities) -> Any:
        """TRL's loss, or its loss and outputs, plus the rows of the objectives."""
        ours = total(self.terms, q)
        if isinstance(result, tuple):
            return result[0] + ours, *result[1:]
        return result + ours


def tokenized_text(text: str, dataset: Any, prepare: Any, processing_class: Any, args: Any) -> Any:
    """TRL's own tokenization of prompt and further text, as two more columns of token ids."""
    present = next(iter(dataset))
    if f"{text}_ids" in present or text not in present:
        return dataset
    if "prompt" not in present:
        raise ValueError(f"prompt: expected a column beside {text!r}, got {sorted(present)}")
    if not hasattr(dataset, "__getitem__"):
        got = type(dataset).__name__
        raise ValueError(f"dataset: expected a map-style one beside {text!r}, got {got}")

    def as_pair(row: Any) -> dict[str, Any]:
        prompt = row.get(f"{text}_prompt", row["prompt"])
        expected, got = (type(row.get(name, row[text])).__name__ for name in ("chosen", text))
        if got != expected:  # a string, or messages
            raise ValueError(f"{text}: expected a {expected} as chosen is, got a {got}")
        return {"prompt": prompt, "chosen": row[text], "rejected": row[text]}

    whole = copy.copy(args)
    whole.max_length = None  # TRL would drop rows; the collator truncates
    plain = dataset.map(as_pair, remove_columns=list(present))
    tokenized = prepare(plain, processing_class, whole, text)

    def keep(row: Any, i: int) -> dict[str, Any]:
        found = tokenized[i]
        return {f"{text}_prompt_ids": found["prompt_ids"], f"{text}_ids": found["chosen_ids"]}

    return dataset.map(keep, with_indices=True)

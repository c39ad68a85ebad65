"""What fastpo's objectives add to a TRL trainer; to one of texts: columns, texts, references."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ....quantities import Quantities
from .columns import ROWS, TEXTS, Carry
from .needs import Needs, Term, total
from .passes import Pass
from .setting import Objective, Setting

# Columns that TRL's tokenization hands to the chat template.
TEMPLATE = ("tools", "chat_template_kwargs")

Texts = dict[str, dict[str, Tensor]]  # "third" -> the rows of the batch's third texts


@contextmanager
def standing_in(owner: Any, **attributes: Any) -> Iterator[None]:
    """What is read of a trainer or a config for the length of one call: attributes, methods."""
    held = vars(owner)
    before = {name: held[name] for name in attributes if name in held}
    held.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            held.pop(name, None)
        held.update(before)


@dataclass
class State:
    """What a trainer of an objective knows, under one name: a script's class has names of its own.

    own_terms: loss types of TRL, with weights. dataset_columns: of the training set, other_sets:
    of each other one, by name. ran: has the objective's loss been asked for? inside: is it
    computed now?
    """

    terms: list[Term]
    own_terms: list[tuple[str, float]]
    setting: Setting
    needs: Needs
    dataset_columns: tuple[str, ...]
    other_sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prepared: bool = False  # the training set, which comes first
    precompute: bool = False
    other_models: dict[str, list[Any]] = field(default_factory=dict)
    kl_logps: Any = None
    ran: bool = False
    inside: bool = False

    @property
    def images(self) -> set[str]:
        """Columns of the training set; TRL prepares no dataset that has one."""
        return {"image", "images"} & set(self.dataset_columns)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.ran = self.inside = True
        try:
            yield
        finally:
            self.inside = False


class ObjectiveTrainer:
    """What all trainers share. Everything not defined here is TRL's."""

    own: tuple[str, ...]  # TRL's loss types
    families: tuple[str, ...]
    sides: Mapping[str, str]  # side of a quantity -> the tokens of TRL's example it lies along
    _fastpo: State
    _objective_loss: Callable[..., Any]  # `_compute_loss`, also where TRL's is called past it

    @classmethod
    def takes(cls, function: Objective) -> bool:
        """Or else its trainer keeps its own loss."""
        return True

    def prepare_objective(
        self, terms: list[Term], own: list[tuple[str, float]], setting: Setting, dataset: Any
    ) -> None:
        """Before TRL's constructor."""
        columns = () if dataset is None else tuple(next(iter(dataset)))
        needs = Needs.of(terms, tuple(self.sides), setting)
        self._fastpo = State(terms, own, setting, needs, columns)

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """Around TRL's constructor."""
        yield

    def finish_objective(self) -> None:
        """After TRL's constructor."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._fastpo.ran = False
        found = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        if not self._fastpo.ran:
            raise RuntimeError(
                f"{type(self).__name__}._compute_loss: expected a call of super()._compute_loss, "
                f"whose loss is {self._fastpo.terms[0].name}, got none"
            )
        return found


class TextTrainer(ObjectiveTrainer):
    """Trainers on texts of a dataset: columns, further texts, references."""

    @property
    def needs_reference(self) -> bool:
        """Of the training set."""
        return self._asks_reference(self._fastpo.dataset_columns)

    def _asks_reference(self, columns: Iterable[str]) -> bool:
        """Must a reference score rows with these columns?"""
        return bool(self._fastpo.own_terms or self._fastpo.needs.of_reference(columns))

    def _runs_reference(self, inputs: Mapping[str, Any]) -> bool:
        """On this batch: an evaluation set may have other columns than the training set."""
        return not self._fastpo.precompute and self._asks_reference(inputs)

    @property
    def _has_reference(self) -> bool:
        """A model of its own, or the policy's without its adapter."""
        from trl.trainer.dpo_trainer import is_peft_model

        trainer: Any = self
        return trainer.ref_model is not None or is_peft_model(trainer.model)

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """TRL's constructor loads no reference model where none is asked for."""
        precompute = config.precompute_ref_log_probs
        self._fastpo.precompute = precompute and self.needs_reference
        texts = [text for text in TEXTS if self._fastpo.needs.text(text)]
        if (images := self._fastpo.images) and texts:  # tokenized in the collator
            raise ValueError(f"{texts[0]}: expected a dataset of texts alone, got {min(images)!r}")
        none = precompute or not (self.needs_reference or images)
        self._refuse_reference_options(config, loaded=not none)
        with standing_in(config, precompute_ref_log_probs=none):
            yield

    def _refuse_reference_options(self, config: Any, *, loaded: bool) -> None:
        """What would fail later, or with a reason that is not the script's."""
        name = self._fastpo.terms[0].name
        if self._fastpo.precompute:
            needs = self._fastpo.needs
            if beyond := needs.of_reference(self._fastpo.dataset_columns) - needs.sums:
                raise ValueError(
                    f"precompute_ref_log_probs: expected False with {name}, which needs "
                    f"{min(beyond)} of the reference, got True"
                )
        elif getattr(config, "sync_ref_model", False) and not loaded:
            raise ValueError(
                f"sync_ref_model: expected False with {name}, which needs no reference model for "
                "the training set, got True"
            )

    def finish_objective(self) -> None:
        """After TRL's constructor."""
        trainer: Any = self
        if self._fastpo.images:
            others = trainer.eval_dataset or {}
            others = others if isinstance(others, dict) else {"eval": others}
            for name, dataset in {"train": trainer.train_dataset, **others}.items():
                self._note_columns(name, tuple(next(iter(dataset))))
        for name, columns in self._fastpo.other_sets.items():
            self._check_reference(name, columns)
        trainer.precompute_ref_logps = self._fastpo.precompute
        trainer.data_collator = self.carrying(trainer.data_collator)
        setting = self._fastpo.setting
        models = {name: setting.models(name) for name in setting.references}
        self._refuse_policy(models)  # before anything is frozen
        self._fastpo.other_models = {
            name: [self._frozen(one) for one in each] for name, each in models.items()
        }

    def _refuse_policy(self, models: Mapping[str, list[Any]]) -> None:
        """Also inside an adapter."""
        trainer: Any = self
        for name, each in models.items():
            if any(part is one for one in each for part in trainer.model.modules()):
                raise ValueError(
                    f"references[{name!r}]: expected another model than the policy, got the policy"
                )

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
        names = self._fastpo.needs.columns()
        texts = [text for text in TEXTS if self._fastpo.needs.text(text)]
        prompts = self._fastpo.setting.score_prompts
        return Carry(collator, names, self.sides, texts=texts, score_prompts=prompts)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        prepare = super()._prepare_dataset  # type: ignore[misc]
        for text in TEXTS:
            if self._fastpo.needs.text(text):
                dataset = tokenized_text(text, dataset, prepare, processing_class, args)
        dataset = prepare(dataset, processing_class, args, name)
        self._note_columns(name, tuple(next(iter(dataset))))
        return dataset

    def _note_columns(self, name: str, columns: tuple[str, ...]) -> None:
        """Of a dataset that is prepared: what is trained is the training set's to decide."""
        state = self._fastpo
        state.needs.check(columns, name)
        if not state.prepared:
            state.dataset_columns, state.prepared = columns, True
            return
        state.other_sets[name] = columns
        if hasattr(self, "ref_model"):  # TRL's constructor prepares before it loads one
            self._check_reference(name, columns)

    def _check_reference(self, name: str, columns: tuple[str, ...]) -> None:
        """None was loaded if the training set's columns stand for it."""
        if self._fastpo.precompute or self._has_reference or not self._asks_reference(columns):
            return
        missing = min(self._fastpo.needs.of_reference(columns))
        raise ValueError(
            f"{missing}: expected a column in dataset {name!r}, too, as the training set needs no "
            f"reference model and none was loaded, or a ref_model, got columns {sorted(columns)}"
        )

    def _set_signature_columns_if_needed(self) -> None:
        trainer: Any = self
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        ours = [
            *self._fastpo.needs.columns(),
            *(f"{t}_{k}" for t in TEXTS for k in ("ids", "prompt_ids")),
        ]
        known = trainer._signature_columns
        known += [name for name in ours if name not in known]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        trainer: Any = self
        if not self._fastpo.precompute or not self._asks_reference(dataset.column_names or ()):
            return dataset
        trainer.data_collator = self.carrying(trainer.data_collator)  # masks count here, too
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]

    def _split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Texts]:
        """TRL's inputs, the columns, and the rows of further texts."""
        columns = {name: inputs[name] for name in self._fastpo.needs.columns() if name in inputs}
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
        if not self._has_reference:
            raise ValueError(
                "ref_model: expected a model, as these rows lack columns that stand for it in the "
                "training set, got None"
            )
        # Not by its truth: of a compiled model that is an error.
        model = trainer.model if trainer.ref_model is None else trainer.ref_model
        run = Pass(model, list(texts.values()))
        return run, trainer.compute_ref_log_probs(run, own)

    def _add(self, result: Any, q: Quantities) -> Any:
        """TRL's loss, or its loss and outputs, plus the rows of the objectives."""
        ours = total(self._fastpo.terms, q)
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
    if not hasattr(dataset, "__len__"):  # PyTorch gives iterable ones a __getitem__
        got = type(dataset).__name__
        raise ValueError(f"dataset: expected a map-style one beside {text!r}, got {got}")

    def as_pair(row: Any) -> dict[str, Any]:
        prompt = row.get(f"{text}_prompt", row["prompt"])
        expected, got = (type(row.get(name, row[text])).__name__ for name in ("chosen", text))
        if got != expected:  # a string, or messages
            raise ValueError(f"{text}: expected a {expected} as chosen is, got a {got}")
        given = {name: row[name] for name in TEMPLATE if name in row}
        return given | {"prompt": prompt, "chosen": row[text], "rejected": row[text]}

    whole = copy.copy(args)
    whole.max_length = None  # TRL would drop rows; the collator truncates
    plain = dataset.map(as_pair, remove_columns=list(present))
    tokenized = prepare(plain, processing_class, whole, text)

    def keep(row: Any, i: int) -> dict[str, Any]:
        found = tokenized[i]
        return {f"{text}_prompt_ids": found["prompt_ids"], f"{text}_ids": found["chosen_ids"]}

    return dataset.map(keep, with_indices=True)

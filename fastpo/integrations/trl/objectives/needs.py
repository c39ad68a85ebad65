"""An objective as a trainer runs it: which function, what it needs, where that comes from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .... import objectives
from ....objectives._quantities import SHAPES, is_mask
from ....objectives._registry import entry_of, lookup, of_table, quantities_of, unwrap
from ....ops.stats import TokenStats
from ....quantities import Quantities, padded
from .columns import TEXTS
from .setting import Objective, Setting

# Hyperparameter -> the option of TRL's configs that it is.
CONFIGURED = {
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
    "epsilon_low": "epsilon",
    "epsilon_high": "epsilon_high",
    "delta": "delta",
    "level": "importance_sampling_level",
    "unbiased_kl": "use_bias_correction_kl",
    "entropy_coef": "entropy_coef",
    "temperature_pos": "sapo_temperature_pos",
    "temperature_neg": "sapo_temperature_neg",
    "k_pos": "vespo_k_pos",
    "lambda_pos": "vespo_lambda_pos",
    "k_neg": "vespo_k_neg",
    "lambda_neg": "vespo_lambda_neg",
    "discopop_tau": "discopop_tau",  # for TRL's discopop alone: "tau" means more than one thing
}


def weighted(weight: float, text: str) -> str:
    return text if weight == 1 else f"{weight}·{text}"


@dataclass(frozen=True)
class Term:
    """One objective of the loss, and its weight."""

    function: Objective
    weight: float = 1.0

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "objective")

    def __str__(self) -> str:
        """With its hyperparameters, as in `0.5·simpo(beta=2.0, gamma=1.0)`."""
        listed = ", ".join(f"{name}={value!r}" for name, value in self._given.items())
        return weighted(self.weight, f"{self.name}({listed})")

    @property
    def parameters(self) -> dict[str, Any]:
        """Hyperparameter -> what is bound to it, or its default."""
        base, bound = unwrap(self.function)
        known = inspect.signature(base).parameters.values()
        return {x.name: bound.get(x.name, x.default) for x in known if x.kind is x.KEYWORD_ONLY}

    @property
    def _given(self) -> dict[str, Any]:
        """Whatever else is bound, too: quantities of a function of the caller's own."""
        return self.parameters | unwrap(self.function)[1]

    @property
    def beta(self) -> float:
        """What scales the rewards that are logged."""
        value = self._given.get("beta", 1.0)
        return float(value) if isinstance(value, int | float) else 1.0


def terms_of(
    config: Any, own: Sequence[str], families: Sequence[str], setting: Setting
) -> tuple[list[Term], list[tuple[str, float]]]:
    """fastpo's objectives, and TRL's own loss types with their weights, that a config asks for."""
    names = [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
    weights = getattr(config, "loss_weights", None) or [1.0] * len(names)
    if setting.objective is not None:
        if config.loss_type != default_of(config, "loss_type"):
            raise ValueError(
                "loss_type: expected the default beside fastpo.patch(objective=...), "
                f"got {config.loss_type!r}"
            )
        term = Term(of_family(setting.bound(), families))
        # TRL's β scales the rewards that are logged, also those of an objective that has none.
        refuse_unheard(config, term, {"beta": term.beta} | term.parameters)
        if getattr(config, "loss_weights", None) is not None:
            raise ValueError(
                "loss_weights: expected None beside fastpo.patch(objective=...), "
                f"got {config.loss_weights!r}"
            )
        return [term], []
    asked = list(zip(names, weights, strict=True))
    theirs = [(name, weight) for name, weight in asked if name in own]
    terms = []
    for name, weight in asked:
        if name not in own:
            function = objectives.get(name, **_configured(config, name))
            terms.append(Term(of_family(function, families), weight))
    setting.refuse_unheard(term.function for term in terms)
    if terms and not theirs:
        heard = {name: value for term in terms for name, value in term.parameters.items()}
        refuse_unheard(config, terms[0], heard)
    return terms, theirs


def of_family(function: Objective, families: Sequence[str]) -> Objective:
    entry = entry_of(function)
    if entry is None:
        _check_parameters(function)
    elif entry.family not in families:
        expected = " or ".join(families)
        raise ValueError(f"{entry.key}: expected an objective of {expected}, got {entry.family}")
    return function


def _check_parameters(function: Objective) -> None:
    """Of a function of the caller's own: quantities by name, and hyperparameters that are known."""
    base, bound = unwrap(function)
    for parameter in inspect.signature(base).parameters.values():
        name, kind = parameter.name, parameter.kind
        if name in bound:
            continue
        if kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise ValueError(f"{name}: expected a value bound beforehand, got none")
        named = kind is parameter.POSITIONAL_OR_KEYWORD and name in SHAPES
        if not named and kind is not parameter.KEYWORD_ONLY:
            raise ValueError(
                f"objective: expected parameters named as quantities are, got {parameter}"
            )


def _configured(config: Any, key: str) -> dict[str, Any]:
    """Hyperparameters whose value in the config was changed; the others keep the paper's."""
    known = lookup(key).parameters
    changed = {
        name: getattr(config, option)
        for name, option in CONFIGURED.items()
        if name in known
        and hasattr(config, option)
        and getattr(config, option) != default_of(config, option)
    }
    if "epsilon_low" in changed and "epsilon_high" in known:
        changed.setdefault("epsilon_high", None)  # the config's default: as epsilon
    return changed


def refuse_unheard(
    config: Any, term: Term, heard: Mapping[str, Any], giver: str = "fastpo.patch"
) -> None:
    """ValueError for an option of TRL's own losses that was changed, and changes nothing here.

    heard: hyperparameter -> its value, which the config may say again.
    """
    for parameter, option in CONFIGURED.items():
        default = default_of(config, option)
        value = getattr(config, option, default)
        if value == default or (parameter in heard and value == heard[parameter]):
            continue
        known = parameter in term.parameters
        hint = f" (give {parameter}= to {giver})" if known else ""
        raise ValueError(f"{option}: expected {default} with {term.name}{hint}, got {value}")


def default_of(config: Any, name: str) -> Any:
    found = {item.name: item for item in dataclasses.fields(config)}.get(name)
    if found is None:
        return None
    if found.default_factory is not dataclasses.MISSING:
        return found.default_factory()
    return found.default


@dataclass(frozen=True)
class Needs:
    """What the terms of one trainer ask for, and where each comes from."""

    required: frozenset[str]
    asked: frozenset[str]  # whatever is required, and what is optional
    sides: tuple[str, ...]
    setting: Setting

    @classmethod
    def of(cls, terms: Iterable[Term], sides: tuple[str, ...], setting: Setting) -> Needs:
        required: set[str] = set()
        asked: set[str] = set()
        for term in terms:
            asked |= set(quantities_of(term.function))
            required |= required_of(term.function)
        return cls(frozenset(required), frozenset(asked), sides, setting)

    @property
    def names(self) -> frozenset[str]:
        return self.asked | {"pair_weights", "sample_weights"}

    def of_reference(self, columns: Iterable[str]) -> set[str]:
        """What the reference model must give, beside these columns."""
        asked = {name for name in self.required if name.startswith("ref_")}
        asked |= self._sums_in(self.required)
        if "kl_logratios" in self.names and not self.setting.reference_free:
            asked.add(_KL_SUM)
        walked = {name for name in self.required if name.endswith(("token_kl", "forward_kl"))}
        mixed = {name for name in self.required if name.startswith("mixed_")}
        return (asked - set(columns)) | walked | mixed

    def _sums_in(self, names: Iterable[str]) -> set[str]:
        """The reference's sums in the log-ratios among the names."""
        if self.setting.reference_free:
            return set()
        found = {f"ref_{n.removesuffix('ratios')}ps" for n in names if n.endswith("logratios")}
        return found & SHAPES.keys()  # kl_logratios are of other rows

    @property
    def sums(self) -> set[str]:
        """All that TRL precomputes of a reference."""
        return {f"ref_{side}_logps" if side else "ref_logps" for side in self.sides} | {_KL_SUM}

    def text(self, kind: str) -> bool:
        """Is a third text ("third") or an unlabelled one ("unlabeled") scored?"""
        return any(name in self.required for name in (f"{kind}_logps", f"ref_{kind}_logps"))

    def asks(self, ending: str) -> bool:
        return any(name.endswith(ending) for name in self.asked)

    def columns(self) -> tuple[str, ...]:
        """Dataset columns worth carrying: constants of the objective, and masks."""
        masks = [f"{side}_mask" if side else "mask" for side in self.sides]
        own = {f"{side}_{kind}" if side else kind for side in self.sides for kind in _OWN}
        return tuple(sorted((self.names - own) | set(masks) | self._sums_in(self.names)))

    def check(self, columns: Iterable[str], dataset: str) -> None:
        """ValueError names what neither the model nor the dataset gives, and how to give it."""
        given = set(columns)
        q = self._placeholder(given)
        for name in sorted(self.required):
            if name not in q:
                got = f"columns {sorted(given)} in dataset {dataset!r}"
                how = _how(name, grouped="completions" in given)
                raise ValueError(f"{name}: expected {how}, got {got}")

    def _placeholder(self, columns: set[str]) -> Quantities:
        zeros = torch.zeros(len(self.sides), 1, dtype=torch.float32, device="cpu")
        stats = TokenStats(logps=zeros, entropy=zeros, log_sum_sq_probs=zeros)
        under = {"ref": zeros, **dict.fromkeys(self.setting.references, zeros)}
        q = padded(
            stats,
            zeros.bool(),
            sides=self.sides,
            reference_free=self.setting.reference_free,
            **under,
        )
        made = {name for name in SHAPES if name.endswith("token_kl")}
        made |= {"kl_logratios", "forward_kl", "rejected_alternative_token_logps"}
        made |= {"labels"} if "label" in columns else set()
        made |= {"groups"} if "completions" in columns else set()
        if self.setting.mixing is not None:
            made |= {"mixed_chosen_logps", "mixed_rejected_logps"}
        for kind in TEXTS:
            if {kind, f"{kind}_ids"} & columns:
                made |= {f"{kind}_logps", f"ref_{kind}_logps", f"{kind}_lengths"}
        names = made | {name for name in columns if name in SHAPES}
        return q | dict.fromkeys(names, zeros)


def required_of(function: Objective) -> set[str]:
    """What a function cannot do without: some hyperparameters need an optional quantity.

    Asked of the table's functions by calls on nothing; a function of the caller's own is not run.
    """
    names = quantities_of(function)
    required = {name for name, needed in names.items() if needed}
    while of_table(function):
        try:
            function(**{name: _nothing(name) for name in required})
            return required
        except ValueError as error:
            missing = str(error).partition(":")[0]
            if missing not in names or missing in required:
                return required  # not about what is missing: the first batch will tell
            required.add(missing)
    return required


def _nothing(name: str) -> Tensor:
    """A quantity of one row, one token, one group and two further models, that says nothing."""
    whole = name.endswith(("lengths", "segments", "groups", "steps", "label_ids"))
    truth = is_mask(name) or name in ("labels", "ties")
    dtype = torch.int64 if whole else torch.bool if truth else torch.float32
    shape = [2 if letter == "K" else 1 for letter in SHAPES[name][0]]
    return torch.zeros(shape, dtype=dtype, device="cpu")


# Per side: what the trainer's own passes give. A column could only be stale.
_OWN = ("logps", "token_logps", "logratios", "lengths", "entropy", "token_kl", "log_sum_sq_probs")
_KL_SUM = "ref_KL_logps"  # TRL's column: of the mismatched rows that kl_logratios are of


def _how(name: str, *, grouped: bool) -> str:
    """grouped: a row is a group of completions."""
    if name.startswith(("third_", "unlabeled_", "ref_third_")):
        text = "unlabeled" if name.startswith("unlabeled") else "third"
        return f"a dataset column {text!r} with a text for every row"
    if name.startswith("mixed_"):
        return "mixing=m in fastpo.patch"
    if name.startswith(("prev_", "history_")):
        model = name.partition("_")[0]
        return f"a dataset column {name!r}, or references={{{model!r}: ...}} in fastpo.patch"
    dimensions = SHAPES.get(name, ((),))[0]
    along = "T" in dimensions
    if grouped:
        per = f"one list per row, {'a list' if along else 'a number'} for every completion"
    else:
        per = "one list per row, a number for every token" if along else "a number per row"
    return f"a dataset column {name!r} ({per})"


def total(terms: Iterable[Term], q: Quantities, **options: Any) -> Tensor:
    """Σ weight·mean of the rows."""
    return torch.stack(
        [term.weight * q.rows(term.function, **options).mean() for term in terms]
    ).sum()

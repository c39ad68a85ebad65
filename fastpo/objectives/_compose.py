"""compose: options many papers share, put around an objective instead of copied into it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from ._math import REDUCTIONS, nll_term, promote
from ._parameters import NonNegative, OneOf, parameters_of
from ._quantities import SHAPES, check_like, check_tensor
from ._registry import entry_of, lookup, of_table, quantities_of, unwrap

_LOGPS_OF = {
    "chosen_logratios": "chosen_logps",
    "rejected_logratios": "rejected_logps",
    "logratios": "logps",
}
_FACTORS = ("pair_weights", "is_weights")  # what a transform does not read, it multiplies

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Step:
    """One call: parameter <- quantity, and result -> quantity."""

    function: Function
    sources: dict[str, str]
    targets: dict[str, str]  # empty: every result keeps its name

    def run(self, scope: dict[str, Tensor]) -> None:
        arguments = {p: scope[name] for p, name in self.sources.items() if name in scope}
        for result, value in self.function(**arguments).items():
            name = self.targets.get(result, result)
            if name in _FACTORS and name in scope and name not in self.sources.values():
                value = _product(name, scope[name], value)
            scope[name] = value


class _Plan:
    """The order of calls and the quantities they need, both known before any tensor is."""

    def __init__(self, reference_free: bool) -> None:
        self.reference_free = reference_free
        self.inputs: dict[str, bool] = {}  # asked from the caller: name -> required
        self.steps: list[_Step] = []
        self.made: dict[str, tuple[str, ...]] = {}  # quantity -> transforms that made it
        self.unused: set[str] = set()
        self.mirrors: dict[str, Function] = {}  # reference quantity -> transform that makes it
        self.opaque = False  # an unregistered transform may make anything

    def want(self, name: str, required: bool = True) -> None:
        """Have `name` in scope: made by a transform, derived from what one made, or asked."""
        logps = _LOGPS_OF.get(name)
        if name in self.made:
            self.unused.difference_update(self.made[name])
        elif logps and self.reference_free:
            self.want(logps, required)
            self._derive(name, lambda a: a, a=logps)
        elif logps in self.made:
            self.want(logps)
            self.want(f"ref_{logps}")
            ratio = functools.partial(_log_ratio, f"ref_{logps}")
            self._derive(name, ratio, a=logps, b=f"ref_{logps}")
        elif name in self.mirrors:
            self._mirror(self.mirrors[name])
        else:
            self.ask(name, required)

    def ask(self, name: str, required: bool = True) -> None:
        """Of the caller, whatever transforms make of it."""
        self.inputs[name] = self.inputs.get(name, False) or (required and not self.opaque)

    def add(self, transform: Function) -> None:
        """Call a transform; what it makes replaces the quantities of that name from here on."""
        entry = entry_of(transform)
        for name, required in quantities_of(transform).items():
            self.want(name, required)
        if entry is not None and "is_weights" in entry.outputs:
            self.want("is_weights", required=False)  # of the batch; rows have its pair_weights
        same = {name: name for name in quantities_of(transform)}
        self.steps.append(_Step(transform, same, {}))
        self.opaque |= entry is None
        if entry is None:
            return
        self.unused.add(entry.key)
        for name in entry.outputs:
            others = self.made.get(name, ()) if name in _FACTORS else ()
            self.made[name] = (*others, entry.key)
            if entry.mirrored:
                self.mirrors[f"ref_{name}"] = transform
                self.made.pop(f"ref_{name}", None)  # by the one before
        for ratio, logps in _LOGPS_OF.items():
            if logps in entry.outputs:  # stale: derived again when asked
                self.made.pop(ratio, None)

    def _derive(self, name: str, function: Function, **sources: str) -> None:
        self.steps.append(_Step(lambda **given: {name: function(**given)}, sources, {}))
        self.made[name] = ()

    def _mirror(self, transform: Function) -> None:
        """The reference's token log-probabilities go the policy's way."""
        entry = entry_of(transform)
        assert entry is not None
        sources = {
            name: f"ref_{name}" if name.endswith("token_logps") else name
            for name in quantities_of(transform)
        }
        for name in sources.values():
            self.want(name)
        targets = {name: f"ref_{name}" for name in entry.outputs}
        self.steps.append(_Step(transform, sources, targets))
        self.made.update(dict.fromkeys(targets.values(), (entry.key,)))


def _product(name: str, before: Tensor, value: Tensor) -> Tensor:
    if before.ndim != value.ndim or len(before) != len(value):
        expected, got = tuple(value.shape), tuple(before.shape)
        raise ValueError(f"{name}: expected shape {expected}, got {got}")
    return before * value


def _log_ratio(reference: str, a: Tensor, b: Tensor) -> Tensor:
    check_like(reference, b, a)
    return a - b.detach()


def compose(
    objective: str | Function,
    *transforms: str | Function,
    sft_weight: Annotated[float, NonNegative] = 0.0,
    sft_reduction: Annotated[str, OneOf(*REDUCTIONS)] = "mean",
    third_weight: Annotated[float, NonNegative] = 0.0,
    reference_free: bool = False,
) -> Function:
    """One function out of an objective, transforms before it and terms added to its rows.

    Transforms run from left to right, each on what the one before it left. The result is a plain
    function of the union of the quantities needed; hyperparameters of the objective that were not
    bound stay keyword-only parameters. Log-ratios are derived again when a transform makes new
    log-probabilities; `reference_free` makes them the log-probabilities. Weights that a transform
    makes multiply those of the batch and of other transforms, unless it reads them.

        rows_i + sft_weight·NLL(chosen_logps, chosen_lengths; sft_reduction)_i
               - third_weight·third_logps_i

    These terms are of the batch's log-probabilities, also where a transform makes others.
    Raises ValueError for an unknown key, a weight outside its range, a transform that does not go
    before this objective or whose result nothing reads, and terms for an objective of groups.
    """
    _PARAMETERS["sft_weight"].check(sft_weight)
    _PARAMETERS["sft_reduction"].check(sft_reduction)
    _PARAMETERS["third_weight"].check(third_weight)
    _PARAMETERS["reference_free"].check(reference_free)
    target = _function("objective", objective)
    stages = [_function("transform", stage) for stage in transforms]
    plan = _planned(target, stages, reference_free)
    _refuse_terms(target, sft_weight=sft_weight, third_weight=third_weight)
    added = ["chosen_logps", "chosen_lengths"] if sft_weight else []
    added += ["third_logps"] if third_weight else []
    for name in added:
        plan.ask(name)
    again = functools.partial(
        compose,
        objective,
        *transforms,
        sft_weight=sft_weight,
        sft_reduction=sft_reduction,
        third_weight=third_weight,
        reference_free=reference_free,
    )
    terms = _Terms(tuple(added), sft_weight, sft_reduction, third_weight)
    return _Composed(target, plan, terms, again)


_PARAMETERS = parameters_of(compose)


def _function(name: str, given: str | Function) -> Function:
    if not (isinstance(given, str) or callable(given)):
        raise ValueError(f"{name}: expected a key or a function, got {given!r}")
    return lookup(given, name).function if isinstance(given, str) else given


def _refuse_terms(target: Function, **weights: float) -> None:
    """Terms are of pairs: where a row is a group of responses, none belongs to it."""
    entry = entry_of(target)
    if entry is None or "groups" not in quantities_of(target):
        return
    for name, weight in weights.items():
        if weight and entry.shapes["groups"] == SHAPES["groups"]:  # elsewhere rows are pairs
            raise ValueError(f"{entry.key}: expected no {name}, rows are groups; got {weight}")


def _planned(target: Function, stages: list[Function], reference_free: bool) -> _Plan:
    plan = _Plan(reference_free)
    entry = entry_of(target)
    key = entry.key if entry else getattr(target, "__name__", repr(target))
    if entry and entry.family == "transforms":
        raise ValueError(f"objective: expected an objective, got the transform {key}")
    for stage in stages:
        row = entry_of(stage)
        if row and row.family != "transforms":
            raise ValueError(f"compose: expected a transform, got the objective {row.key}")
        if row and row.before is not None and not (entry and key in row.before):
            allowed = ", ".join(sorted(row.before))
            raise ValueError(f"{row.key}: expected an objective among {allowed}, got {key}")
        plan.add(stage)
    wanted = quantities_of(target)
    for name, required in wanted.items():
        plan.want(name, required)
    if "pair_weights" in plan.made and "pair_weights" not in wanted:
        if getattr(unwrap(target)[0], "refuses_weights", False):
            maker = plan.made["pair_weights"][0]
            raise ValueError(f"{key}: expected no pair_weights, rows are not pairs; got {maker}")
        plan.want("pair_weights")
    exempt = {row.key for row in map(entry_of, stages) if row and row.before is not None}
    if idle := plan.unused - exempt:
        raise ValueError(f"{key}: expected transforms whose result is used, got {min(idle)}")
    return plan


@dataclass(frozen=True)
class _Terms:
    """What `compose` adds to the rows."""

    added: tuple[str, ...]  # quantities, one for each row
    sft_weight: float
    sft_reduction: str
    third_weight: float

    def __call__(self, rows: Tensor, scope: dict[str, Tensor]) -> Tensor:
        for name in self.added:
            check_like(name, scope[name], rows)
        if self.sft_weight:
            nll = nll_term(scope["chosen_logps"], scope["chosen_lengths"], self.sft_reduction)
            rows = rows + self.sft_weight * nll
        return rows - self.third_weight * scope["third_logps"] if self.third_weight else rows


class _Composed:
    """What `compose` makes. A pickle holds what it was made of, and composes it again."""

    def __init__(
        self, target: Function, plan: _Plan, terms: _Terms, again: Callable[[], Function]
    ) -> None:
        self._target, self._plan, self._terms, self._again = target, plan, terms, again
        self._wanted = list(quantities_of(target))
        self._weigh = "pair_weights" in plan.made and "pair_weights" not in self._wanted
        base = unwrap(target)[0]
        self.__name__ = getattr(base, "__name__", "composed")
        self.__doc__ = base.__doc__
        self.__signature__ = _signature(target, plan)
        self.refuses_weights = getattr(base, "refuses_weights", False)
        self.of_table = of_table(target) and not plan.opaque

    def __call__(self, *args: Tensor, **kwargs: Any) -> Tensor:
        plan, wanted = self._plan, self._wanted
        given = self.__signature__.bind(*args, **kwargs).arguments
        present = [n for n in plan.inputs if given.get(n) is not None]
        asked = {n: promote(check_tensor(n, given.pop(n))) for n in present}
        scope = dict(asked)
        options = {name: value for name, value in given.items() if name not in plan.inputs}
        for step in plan.steps:
            step.run(scope)
        rows = self._target(**{name: scope[name] for name in wanted if name in scope}, **options)
        if self._weigh:
            check_like("pair_weights", scope["pair_weights"], rows)
            rows = rows * scope["pair_weights"]
        return self._terms(rows, scope | asked)

    def __reduce__(self) -> tuple[Callable[[], Function], tuple[()]]:
        return self._again, ()


def _signature(target: Function, plan: _Plan) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    required = [inspect.Parameter(n, kind) for n, needed in plan.inputs.items() if needed]
    optional = [
        inspect.Parameter(n, kind, default=None) for n, needed in plan.inputs.items() if not needed
    ]
    free = [
        parameter
        for parameter in inspect.signature(target).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
        and parameter.name not in quantities_of(unwrap(target)[0])
    ]
    return inspect.Signature([*required, *optional, *free])

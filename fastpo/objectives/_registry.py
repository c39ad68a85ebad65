"""The table of objectives, and the errors made from it.

An entry is a function and a decorator:

    @objective("hinge", paper="arXiv:2305.10425", family="pairs", aliases=("slic",))
    def hinge(
        chosen_logratios: Tensor,  # [B] nats
        rejected_logratios: Tensor,  # [B] nats
        *,
        beta: Annotated[float, Positive] = 0.1,
    ) -> Tensor:  # [B]
        "max(0, 1 - β·Δ)."
        return torch.relu(1 - beta * (chosen_logratios - rejected_logratios))

Positional parameters are quantities of `_quantities.SHAPES`. Inside the function they have been
checked, promoted to float32, detached unless they carry a gradient, and zeroed where unscored.
Keyword-only parameters are hyperparameters; the annotation is their range (a bare float may be any
finite number, or a 0-d tensor, a constant). The range is checked when bound and when called.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from torch import Tensor, compiler

from ._parameters import Finite, Parameter, parameters_of
from ._quantities import SHAPES, Shapes, parse_shapes, prepare

FAMILIES = (
    "transforms",
    "pairs",
    "tokens",
    "groups",
    "singles",
    "policy_gradient",
    "distillation",
    "rewards",
    "denoising",
)
F = TypeVar("F", bound=Callable[..., Any])


def quantities_of(function: Callable[..., Any]) -> dict[str, bool]:
    """The quantities a function takes, in order: name -> is it required?"""
    function, bound = unwrap(function)
    return {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in bound
    }


def unwrap(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function below its partials, and what they bind, by name."""
    bound: dict[str, Any] = {}
    first: tuple[Any, ...] = ()
    while isinstance(function, functools.partial):
        bound = {**function.keywords, **bound}
        first = (*function.args, *first)
        function = function.func
    names = inspect.signature(function).parameters if first else ()
    return function, dict(zip(names, first, strict=False)) | bound


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    key: str
    family: str
    paper: str
    aliases: tuple[str, ...]
    function: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    outputs: tuple[str, ...] = ()  # transforms: the quantities they return
    before: frozenset[str] | None = None  # transforms: the only objectives they may precede
    mirrored: bool = False  # transforms: the reference goes through it too
    refuses_weights: bool = False  # the rows are not the batch's rows
    shapes: Mapping[str, Shapes] = field(default_factory=lambda: SHAPES)
    gradient_into: tuple[str, ...] = ()  # constants elsewhere

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        for name, value in hyperparameters.items():
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise ValueError(f"{self.key}: expected hyperparameters among {known}, got {name}")
            self.parameters[name].check(value)


_TABLE: dict[str, Entry] = {}
_ALIASES: dict[str, str] = {}


def objective(
    key: str,
    *,
    paper: str = "",
    family: str | None = None,
    aliases: Sequence[str] = (),
    gradient_into: Sequence[str] = (),
    refuses_weights: bool = False,
    shapes: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Enter a function into the table.

    `family`: None is the module's name. `gradient_into`: quantities that are constants elsewhere
    and carry a gradient here. `shapes`: of quantities whose shape here is narrower, or has other
    letters: {"chosen_rewards": "B D"}. ValueError for a name that is taken or no quantity.
    """
    narrowed = {**SHAPES, **{name: parse_shapes(text) for name, text in (shapes or {}).items()}}

    def register(function: F) -> F:
        for option, names in (("gradient_into", gradient_into), ("shapes", shapes or ())):
            if stray := [name for name in names if name not in quantities_of(function)]:
                raise ValueError(f"{option}: expected quantities of {key}, got {', '.join(stray)}")
        parameters = parameters_of(function)
        call = _guarded(function, parameters, tuple(gradient_into), narrowed)
        home = family or function.__module__.rpartition(".")[2]
        entry = Entry(key, home, paper, tuple(aliases), call, parameters, shapes=narrowed)
        carries = tuple(gradient_into)
        _enter(replace(entry, refuses_weights=refuses_weights, gradient_into=carries))
        return cast(F, call)

    return register


def transform(
    key: str,
    *,
    paper: str = "",
    outputs: Sequence[str],
    before: frozenset[str] | None = None,
    mirrored: bool = False,
) -> Callable[[F], F]:
    """Enter a transform: a function of quantities that returns a dict of `outputs`.

    `before`: the only objectives it may precede. `mirrored`: called a second time on the
    reference's token log-probabilities, giving `ref_` + outputs, where these are needed.
    """

    def register(function: F) -> F:
        call = _guarded(function, parameters := parameters_of(function), ())
        entry = Entry(key, "transforms", paper, (), call, parameters, tuple(outputs))
        _enter(replace(entry, before=before, mirrored=mirrored))
        return cast(F, call)

    return register


def _guarded(
    function: Callable[..., Any],
    parameters: Mapping[str, Parameter],
    gradient_into: tuple[str, ...],
    shapes: Mapping[str, Shapes] = SHAPES,
) -> Callable[..., Any]:
    """The function behind its door: parameters in range, quantities prepared."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Tensor, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        hyperparameters = {name: given.pop(name) for name in parameters if name in given}
        for name, value in hyperparameters.items():
            parameters[name].check(value)
            if isinstance(value, Tensor) and parameters[name].range is Finite:
                hyperparameters[name] = value.detach()
        return function(**prepare(given, gradient_into, shapes), **hyperparameters)

    return call


def _enter(entry: Entry) -> None:
    if entry.family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {entry.family!r}")
    if unknown := [name for name in quantities_of(entry.function) if name not in SHAPES]:
        raise ValueError(f"{entry.key}: expected quantities of the catalogue, got {unknown}")
    taken = {*_TABLE, *_ALIASES}.difference(old := _redefined(entry))
    if clash := [name for name in (entry.key, *entry.aliases) if name in taken]:
        raise ValueError(f"{entry.key}: expected a name that is free, got {clash[0]!r}")
    for name in old:
        _ALIASES.pop(name, None)
    _TABLE[entry.key] = entry
    _ALIASES.update(dict.fromkeys(entry.aliases, entry.key))
    entry.function.__doc__ = _document(entry)
    vars(entry.function).update(entry=entry, refuses_weights=entry.refuses_weights)


def _redefined(entry: Entry) -> tuple[str, ...]:
    """The names that the same function had before, as when a notebook's cell is run again."""
    old = _TABLE.get(entry.key)
    homes = {(x.function.__module__, x.function.__qualname__) for x in (old, entry) if x}
    return (old.key, *old.aliases) if old and len(homes) == 1 else ()


def _document(entry: Entry) -> str:
    """The function's own text, then its paper and the ranges, from the table."""
    lines = [inspect.cleandoc(entry.function.__doc__ or entry.key), ""]
    if entry.paper:
        lines.append(f"Paper: {entry.paper}")
    lines += [f"{name}: {parameter.expected}" for name, parameter in entry.parameters.items()]
    return "\n".join(lines).rstrip()


def available(family: str | None = None) -> tuple[str, ...]:
    """The keys of the table, or of one family; ValueError for a family that is none."""
    if family is None:
        return tuple(key for home in FAMILIES for key in available(home))
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    return tuple(key for key, entry in _TABLE.items() if entry.family == family)


def families() -> dict[str, tuple[str, ...]]:
    """Every family and its keys, in the order of the table."""
    return {family: available(family) for family in FAMILIES}


def lookup(key: str, what: str = "objective") -> Entry:
    """The row of a key or an alias; `what` it is called in the error."""
    entry = _TABLE.get(_ALIASES.get(key, key)) if isinstance(key, str) else None
    if entry is None:
        near = difflib.get_close_matches(str(key), [*_TABLE, *_ALIASES])
        close = f"; close to it: {', '.join(near)}" if near else ""
        table = "fastpo.objectives.available(), which `fastpo objectives` lists"
        raise ValueError(f"{what}: expected one of {table}, got {key!r}{close}")
    return entry


def entry_of(function: Callable[..., Any]) -> Entry | None:
    """The row behind a function or a partial of it; None for a function not in the table."""
    return cast(Entry | None, getattr(unwrap(function)[0], "entry", None))


def of_table(function: Callable[..., Any]) -> bool:
    """Is it a row of the table, or composed of rows alone? Then it remembers nothing of a call."""
    base = unwrap(function)[0]
    return getattr(base, "of_table", getattr(base, "entry", None) is not None)


def get(key: str, /, **hyperparameters: Any) -> Callable[..., Any]:
    """The objective or transform of a key or alias, bound; ValueError for a bad key or value."""
    entry = lookup(key)
    if not hyperparameters:
        return entry.function
    entry.check(hyperparameters)
    bound = functools.partial(entry.function, **hyperparameters)
    if not compiler.is_compiling():  # for which a partial has no attributes of its own
        vars(bound).update(__name__=entry.function.__name__, __doc__=entry.function.__doc__)
    return bound

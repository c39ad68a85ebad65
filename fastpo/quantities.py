"""Named quantities, derived from token statistics the first time an objective asks for them.

    q = quantities.padded(stats, mask, ref=ref_stats)     # [2B, T], chosen rows first
    q = quantities.packed(stats, offsets, ref=ref_stats)  # [S] tokens, [2B + 1] offsets
    q = q | {"soft_labels": labels}                       # any other column of the batch
    loss = q.rows(objectives.get("dpo", beta=0.3)).mean()

Names are those of the catalogue. What is derived:

    {model}{side}logps   sum of {model}{side}token_logps over {side}mask
    {side}lengths        number of positions in {side}mask
    {side}logratios      {side}logps - ref_{side}logps; {side}logps when reference_free

side is "chosen_", "rejected_", "third_", "unlabeled_", or "" for single responses and groups;
model is "" for the policy, or "ref_", "old_", "prev_", "history_", "mixed_", "sampler_". No value
is read on the host.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PAIRS = ("chosen", "rejected")
SINGLES = ("",)
_SIDES = ("chosen_", "rejected_", "third_", "unlabeled_")
_MODELS = ("", "ref_", "old_", "prev_", "history_", "mixed_", "sampler_")
_STATISTICS = {  # field of TokenStats -> what the catalogue calls it
    "logps": "token_logps",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
}
_UNDER = ("ref_", "old_", "prev_", "mixed_", "sampler_", "teacher_")  # one policy each
_ROW_WEIGHTS = ("pair_weights", "sample_weights")
Lazy = Tensor | Callable[[], Tensor]


class Quantities:
    """Tensors by name: given, or derived when asked. A given value may be a function, called once.

    `q[name]` derives, `name in q` says whether it can, `q | columns` adds columns. `q.rows` gives
    an objective's losses, [B]. Sums and log-ratios are [B] in nats, in float32 or the dtype of a
    float64 input; quantities of tokens [B, T]. Raises ValueError for what is neither given nor can
    be derived, and says what it could be derived from.
    """

    def __init__(self, given: Mapping[str, Lazy | None], *, reference_free: bool = False) -> None:
        self.given = {name: value for name, value in given.items() if value is not None}
        self.reference_free = reference_free
        self._derived: dict[str, Tensor] = {}

    def __or__(self, columns: Mapping[str, Lazy | None]) -> "Quantities":
        return Quantities({**self.given, **columns}, reference_free=self.reference_free)

    def __contains__(self, name: str) -> bool:
        inputs = self._inputs(name)
        return name in self.given or (bool(inputs) and all(one in self for one in inputs))

    def __getitem__(self, name: str) -> Tensor:
        return self.derive(name)

    def derive(self, name: str) -> Tensor:
        """The quantity of that name; ValueError says what it could have been derived from."""
        if name not in self._derived:
            if name not in self:
                got = ", ".join(self.given) or "nothing"
                raise ValueError(f"{name}: expected {self._expected(name)}, got {got}")
            value: object = self.given.get(name, functools.partial(self._compute, name))
            value = value() if callable(value) else value
            if not isinstance(value, Tensor):
                got = type(value).__name__
                raise ValueError(f"{name}: expected a tensor or a function of none, got {got}")
            self._derived[name] = value
        return self._derived[name]

    def for_objective(self, objective: Callable[..., Any]) -> dict[str, Tensor]:
        """What an objective's positional parameters ask for; optional ones where available."""
        wanted, _ = _positional(objective)
        return {name: self[name] for name, needed in wanted.items() if needed or name in self}

    def rows(self, objective: Callable[..., Tensor], **hyperparameters: Any) -> Tensor:
        """The objective's rows; weights of the batch that it does not name itself multiply them."""
        rows = objective(**self.for_objective(objective), **hyperparameters)
        if not isinstance(rows, Tensor) or rows.dim() != 1:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"objective: expected one loss per row, unreduced, got {got}")
        function = _positional(objective)[1]
        named = inspect.signature(function).parameters
        for name in _ROW_WEIGHTS:
            if name not in self.given or name in named:
                continue
            if getattr(function, "refuses_weights", False):
                raise ValueError(f"{name}: expected none, the rows are not pairs, got a column")
            weights = self[name].detach()
            if weights.shape != rows.shape:
                expected, got = tuple(rows.shape), tuple(weights.shape)
                raise ValueError(f"{name}: expected shape {expected}, got {got}")
            rows = rows * weights
        return rows

    def _inputs(self, name: str) -> tuple[str, ...]:
        """What `name` is derived from; empty if it can only be given."""
        model, side, kind = _parse(name)
        if kind == "lengths" and not model:
            return (f"{side}mask",)
        if kind == "logps" and model in _MODELS:
            return (f"{model}{side}token_logps", f"{side}mask")
        if kind == "logratios" and not model:
            reference = () if self.reference_free else (f"ref_{side}logps",)
            return (f"{side}logps", *reference)
        return ()

    def _compute(self, name: str) -> Tensor:
        names = self._inputs(name)
        inputs = [self[one] for one in names]
        kind = _parse(name)[2]
        if kind == "lengths":
            return inputs[0].bool().sum(-1)
        if kind == "logps":
            # Of several policies (history) there is one such table each.
            _check(names[0], inputs[0], (*inputs[0].shape[: -inputs[1].ndim], *inputs[1].shape))
            return torch.where(inputs[1].bool(), _promote(inputs[0]), 0).sum(-1)
        policy, *reference = map(_promote, inputs)
        if not reference:
            return policy
        _check(names[1], reference[0], tuple(policy.shape))  # broadcast, it would be other rows'
        return policy - reference[0].detach()

    def _expected(self, name: str) -> str:
        """What would give it: a column, what it is derived from, an argument."""
        leaf = name
        while deeper := self._missing(leaf):
            leaf = deeper[0]
        if sides := self._sides(leaf):
            return sides
        missing = self._missing(name)
        free = any(one.startswith("ref_") for one in missing) and name.endswith("logratios")
        ways = [" and ".join(missing), self._argument(leaf), "reference_free=True" * free]
        *others, last = ["a column of that name", *filter(None, ways)]
        return f"{', '.join(others)} or {last}" if others else last

    def _missing(self, name: str) -> list[str]:
        return [one for one in self._inputs(name) if one not in self]

    def _sides(self, name: str) -> str:
        """Were rows of pairs taken for single responses, or the reverse?"""
        if f"chosen_{name}" in self.given:
            return 'padded(..., sides=("",)) for single responses'
        if name.removeprefix("chosen_").removeprefix("rejected_") in {*self.given} - {name}:
            return 'padded(..., sides=("chosen", "rejected")) for pairs'
        return ""

    def _argument(self, name: str) -> str:
        """What `padded` or `packed` was not given, for a name that is derived from none."""
        model = next((one for one in _UNDER if name.startswith(one)), "")
        if model and name.endswith("token_logps"):
            return f"padded(..., {model[:-1]}=...)"
        side = next((one for one in _SIDES if name.startswith(one)), "")
        by_token = name.removeprefix(side) in ("mask", *_STATISTICS.values())
        return "packed(..., width=...)" if by_token and f"{side}lengths" in self.given else ""


def padded(
    stats: Any,
    mask: Tensor,
    *,
    sides: Sequence[str] = PAIRS,
    reference_free: bool = False,
    **under: Any,
) -> Quantities:
    """Quantities of R = len(sides)·B rows, side under side: all chosen, then all rejected.

    stats: a TokenStats of [R, T], or its logps alone.
    mask: [R, T] bool, scored tokens.
    sides: ("",) for single responses and groups.
    reference_free: log-ratios are log-probabilities.
    under: the same tokens under other models, each like `stats`, by name: ref, old, prev, mixed,
        sampler or teacher.

    Raises ValueError for shapes that differ, R that is no multiple of the sides, unknown models.
    """
    _check_tensors(mask=mask)
    rows = _Rows(mask.shape[0], sides)
    given = rows.share("", "mask", mask.bool())
    for model, kind, values in _statistics(stats, under):
        _check(f"{model}{kind}", values, tuple(mask.shape))
        given |= rows.share(model, kind, values)
    return Quantities(given, reference_free=reference_free)


def packed(
    stats: Any,
    offsets: Tensor,
    *,
    mask: Tensor | None = None,
    width: int | None = None,
    sides: Sequence[str] = PAIRS,
    reference_free: bool = False,
    **under: Any,
) -> Quantities:
    """The same for sequences laid end to end, row i being tokens offsets[i] to offsets[i + 1].

    stats: a TokenStats of [S], or its logps alone.
    offsets: [R + 1] int64, ascending, offsets[R] <= S; else a ValueError, and NaN on a GPU or in a
        compiled function.
    mask: [S] bool, scored tokens; None: all.
    sides, reference_free, under, errors: as in `padded`.

    Sums need no padding. Token-level quantities do: they are there when `width`, at least the
    longest row, is given.
    """
    if width is not None and width < 0:
        raise ValueError(f"width: expected at least 0, got {width}")
    _check_tensors(offsets=offsets, **({} if mask is None else {"mask": mask}))
    rows = _Rows(offsets.shape[0] - 1, sides)
    tokens = _statistics(stats, under)
    size = tuple(tokens[0][2].shape[:1])
    if mask is None:
        scored = torch.ones(size, dtype=torch.bool, device=offsets.device)
    else:
        scored = mask.bool()
    _check("mask", scored, size)
    offsets, right = _readable(offsets, size[0], width)
    given = rows.share("", "lengths", lambda: _segment_sum(scored, offsets).long())
    if width is not None:
        given |= rows.share("", "mask", functools.partial(_pad, scored, offsets, width))
    for model, kind, values in tokens:
        _check(f"{model}{kind}", values, size)
        if kind == "token_logps":
            kept = torch.where(scored, _promote(values), 0) + right
            given |= rows.share(model, "logps", functools.partial(_segment_sum, kept, offsets))
        if width is not None:
            kept = values + right
            given |= rows.share(model, kind, functools.partial(_pad, kept, offsets, width))
    return Quantities(given, reference_free=reference_free)


def _readable(offsets: Tensor, size: int, width: int | None) -> tuple[Tensor, Tensor]:
    """Offsets within the tokens, and what is added to every number: 0, or NaN on a GPU, which
    nobody waits for, and in a compiled graph, where others were given. On a CPU those are a
    ValueError."""
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.is_floating_point():
        got = f"{offsets.dtype} of {tuple(offsets.shape)}"
        raise ValueError(f"offsets: expected integers of shape (rows + 1,), got {got}")
    given = offsets.long()
    within = given.clamp(0, size).cummax(0).values
    longest = torch.cat((given.diff(), given.new_zeros(1))).max()
    right = (within == given).all()
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        if not right:
            raise ValueError(f"offsets: expected ascending in [0, {size}], got {given.tolist()}")
        if width is not None and longest > width:
            raise ValueError(f"width: expected at least the longest row, {longest}, got {width}")
    elif width is not None:
        right = right & (longest <= width)
    return within, torch.where(right, 0.0, torch.nan)


class _Rows:
    """Rows of several sides, one side under the other."""

    def __init__(self, count: int, sides: Sequence[str]) -> None:
        if not sides:
            raise ValueError(f"sides: expected at least one, got {sides!r}")
        if count % len(sides):
            names = ", ".join(sides)
            raise ValueError(f"rows: expected a multiple of {len(sides)} ({names}), got {count}")
        self.size = count // len(sides)
        self.sides = [f"{side}_" if side else "" for side in sides]

    def share(self, model: str, kind: str, whole: Lazy) -> dict[str, Lazy]:
        """Every side's part of `whole`, which is computed once, when a part is first asked for."""
        found: list[Tensor] = []  # not functools.cache, which a compiler takes for no cache

        def part(i: int) -> Tensor:
            if not found:
                found.append(whole if isinstance(whole, Tensor) else whole())
            return found[0][i * self.size : (i + 1) * self.size]

        return {
            f"{model}{side}{kind}": functools.partial(part, i) for i, side in enumerate(self.sides)
        }


def _statistics(stats: Any, under: Mapping[str, Any]) -> list[tuple[str, str, Tensor]]:
    """(model, catalogue name, values) of every statistic present; of other models only logps."""
    found = []
    for field, kind in _STATISTICS.items():
        values = getattr(stats, field, stats if field == "logps" else None)
        if values is not None:
            found.append(("", kind, values))
    for model, other in under.items():
        if f"{model}_" not in (*_UNDER, "history_"):  # of several policies
            known = ", ".join(name[:-1] for name in _UNDER)
            raise ValueError(f"under: expected models among {known}, got {model}")
        if other is not None:
            found.append((f"{model}_", "token_logps", getattr(other, "logps", other)))
    if not found or found[0][1] != "token_logps":
        raise ValueError("stats: expected log-probabilities in stats.logps, got None")
    _check_tensors(**{f"{model}{kind}": values for model, kind, values in found})
    return found


def _check_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(values.shape)}")


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[S] -> [R]. In float64: on a CPU segment_reduce adds one by one, where sum goes pairwise."""
    total = torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True, initial=0)
    return total.to(values.dtype) if values.is_floating_point() else total


def _pad(values: Tensor, offsets: Tensor, width: int) -> Tensor:
    """[S] -> [R, width], 0 behind the end of a row."""
    position = torch.arange(width, dtype=torch.int64, device=offsets.device) + offsets[:-1, None]
    inside = position < offsets[1:, None]
    if values.shape[0] == 0:
        return torch.zeros(inside.shape, dtype=values.dtype, device=values.device)
    return values[position.clamp(max=values.shape[0] - 1)].masked_fill(~inside, 0)


def _parse(name: str) -> tuple[str, str, str]:
    """ "ref_chosen_logps" -> ("ref_", "chosen_", "logps"); kind "" for names with no rule."""
    for kind in ("logratios", "logps", "lengths"):
        stem = name.removesuffix(kind)
        if stem != name:
            side = next((side for side in _SIDES if stem.endswith(side)), "")
            return stem.removesuffix(side), side, kind
    return name, "", ""


def _positional(objective: Any) -> tuple[dict[str, bool], Callable[..., Any]]:
    """Quantities an objective takes (name -> required?), and the function below its partials."""
    bound: set[str] = set()
    if not callable(objective):
        key = objective if isinstance(objective, str) else "dpo"
        raise ValueError(
            f"objective: expected a function, as fastpo.objectives.get({key!r}) gives, "
            f"got {objective!r}"
        )
    while isinstance(objective, functools.partial):
        bound |= set(objective.keywords)
        objective = objective.func
    wanted = {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(objective).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    if not wanted:
        raise ValueError(
            "objective: expected a function of parameters named after quantities, as a module's "
            f"forward is, got {getattr(objective, '__name__', type(objective).__name__)}"
            f"{inspect.signature(objective)}"
        )
    return {name: needed for name, needed in wanted.items() if name not in bound}, objective


def _promote(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

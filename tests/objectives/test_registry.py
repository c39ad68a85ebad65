"""How an objective and its hyperparameters are registered, and what is refused."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pytest
from torch import Tensor, ones

from fastpo import objectives
from fastpo.objectives import Interval, NonNegative, Positive, _registry
from fastpo.objectives._parameters import parameters_of


def test_registering():
    def mine(chosen_logps: Tensor, *, scale=2.0):
        """scale·c."""
        return scale * chosen_logps

    with pytest.raises(ValueError, match=r"^dpo: expected a name that is free, got 'dpo'$"):
        objectives.objective("dpo", family="pairs")(mine)
    with pytest.raises(ValueError, match=r"^family: expected one of .*, got 'test_registry'$"):
        objectives.objective("mine")(mine)

    def other(chosen_logprobs: Tensor):
        return chosen_logprobs

    with pytest.raises(
        ValueError, match=r"^other: expected quantities of the catalogue, got .*logprobs"
    ):
        objectives.objective("other", family="pairs")(other)


def test_a_cell_of_a_notebook_that_is_run_again():
    """The row is that of the last run, aliases too; another function's name stays taken."""

    def run(scale, aliases):
        @objectives.objective("cell_of_a_test", family="pairs", aliases=aliases)
        def mine(chosen_logps: Tensor):
            return scale * chosen_logps

    def other(chosen_logps: Tensor):
        return chosen_logps

    order = objectives.available()
    run(2.0, ("first_name", "kept_name"))
    try:
        run(3.0, ("kept_name",))
        assert objectives.available("pairs").count("cell_of_a_test") == 1
        assert objectives.get("kept_name")(ones(2)).tolist() == [3.0, 3.0]
        with pytest.raises(ValueError, match="got 'first_name'"):
            objectives.get("first_name")
        with pytest.raises(ValueError, match="expected a name that is free, got 'dpo'"):
            run(4.0, ("dpo",))
        with pytest.raises(ValueError, match="expected a name that is free, got 'cell_of_a_test'"):
            objectives.objective("cell_of_a_test", family="pairs")(other)
        assert objectives.get("kept_name")(ones(2)).tolist() == [3.0, 3.0]
    finally:
        for name in ("cell_of_a_test", "kept_name"):
            _registry._TABLE.pop(name, None)
            _registry._ALIASES.pop(name, None)
    assert objectives.available() == order


@pytest.mark.parametrize(
    ("option", "names"),
    [("gradient_into", ("chosen_token_weight",)), ("shapes", {"chosen_reward": "B D"})],
)
def test_options_name_the_functions_quantities(option, names):
    """A name that is none of them would be a gradient, or a shape, that nobody hears of."""

    def mine(chosen_token_weights: Tensor):
        return chosen_token_weights

    message = rf"^{option}: expected quantities of mine, got {'.*'.join(names)}$"
    with pytest.raises(ValueError, match=message):
        objectives.objective("mine", family="pairs", **{option: names})(mine)


def test_hints_that_only_a_type_checker_imports():
    def mine(chosen_logps: "Imported", *, beta: "Annotated[float, NonNegative]" = 0.1): ...  # noqa: F821

    assert parameters_of(mine)["beta"].range is NonNegative


def test_hints_of_names_that_only_a_function_has():
    def mine(*, beta: "Annotated[float, Mine]" = 0.1): ...  # noqa: F821

    with pytest.raises(
        ValueError, match=r"mine: expected annotations of names .*, got one of Mine$"
    ):
        objectives.objective("mine", family="pairs")(mine)


def test_a_key_that_is_none():
    """What is near it, in one line."""
    for key, near in (("dpoo", "; close to it: dpo, "), ([], "$"), ("zzzzzzzz", "$")):
        with pytest.raises(
            ValueError, match=r"^objective: expected one of [^,]+, .*" + near
        ) as error:
            objectives.get(key)
        assert len(str(error.value)) < 200


def test_kinds_of_hyperparameters():
    def mine(
        *,
        weights: Annotated[Sequence[float] | None, NonNegative] = None,
        count: Annotated[int | None, Interval(1, 9, "[)")] = None,
        flag: bool = False,
        free=None,
    ): ...

    known = parameters_of(mine)
    good = {"weights": ([1, 0.5], (), None), "count": (1, None), "flag": (True,), "free": (1, "x")}
    bad = {"weights": (0.5, [-1.0], ["x"], [True]), "count": (9, 1.0, True), "flag": (1, None)}
    assert all(known[name].admits(value) for name, values in good.items() for value in values)
    assert not any(known[name].admits(value) for name, values in bad.items() for value in values)
    with pytest.raises(
        ValueError, match=r"^weights: expected a list of numbers in \[0, inf\) or None"
    ):
        known["weights"].check(0.5)
    with pytest.raises(
        ValueError, match=r"^count: expected an integer in \[1, 9\) or None, got 9$"
    ):
        known["count"].check(9)


def test_choices_and_lists_by_their_types():
    def mine(
        *,
        kind: Literal["hard", "soft"] = "hard",
        order: Literal[1, 2] | None = None,
        halves: list[Annotated[float, Positive]] = (),
        steps: Sequence[int] | None = None,
        sides: tuple[Literal["left", "right"], ...] = (),
        pair: tuple[float, str] = (0.5, "x"),
        either: Literal["auto"] | float = "auto",
    ): ...

    known = parameters_of(mine)
    good = {"kind": ("soft",), "order": (2, None), "halves": ([0.5], ()), "steps": ([1], None)}
    good |= {"sides": (["left"],), "pair": ((1.0, "y"),), "either": ("auto", 0.5)}
    assert all(known[name].admits(value) for name, values in good.items() for value in values)
    wrong = {
        "kind": ("sotf", "one of hard, soft, got 'sotf'"),
        "order": (True, "one of 1, 2 or None, got True"),
        "halves": ([0.0], r"a list of numbers in \(0, inf\), got \[0.0\]"),
        "steps": ([1.5], r"a list of integers in \(-inf, inf\) or None, got \[1.5\]"),
        "sides": ("left", "a list of one of left, right, got 'left'"),
    }
    for name, (value, text) in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}: expected {text}$"):
            known[name].check(value)
    assert not known["steps"].admits(Tensor(1)[0]), "no list of one"

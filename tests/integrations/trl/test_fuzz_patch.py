"""Any order of `patch`, `unpatch` and `patched`: TRL holds what was said last, and all of it."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with objectives by name

import trl
from hypothesis import given
from hypothesis import strategies as st

import fastpo
from fastpo.integrations.seams import imports
from fastpo.integrations.seams.seam import Replacement
from fastpo.integrations.trl.head import HEAD
from fastpo.integrations.trl.patch import SEAMS

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "budget": st.integers(0, 9),
        "backend": st.sampled_from([None, "torch"]),
        "accumulate": st.booleans(),
        "shared_prompts": st.booleans(),
        "padding_free": st.booleans(),
        "objective": st.sampled_from([None, "ipo", "simpo"]),
    },
).filter(lambda options: not (options.get("shared_prompts") and options.get("padding_free")))
WRONG = st.sampled_from(
    [
        {"objective": "no such objective"},
        {"objective": "ipo", "no_such_parameter": 1},
        {"mixing": 0.5, "budget": -1},
        {"backend": "no such backend"},
        {"whole_groups": True, "budget": 77},
        {"reference_free": True, "budget": 77},
    ]
)
STEPS = st.lists(
    st.tuples(st.just("patch"), OPTIONS)
    | st.tuples(st.just("wrong"), WRONG)
    | st.tuples(st.just("unpatch"))
    | st.tuples(st.just("subclass"))
    | st.tuples(st.just("enter"), OPTIONS)
    | st.tuples(st.just("leave"), st.booleans()),
    max_size=10,
)


def held():
    """All that stands in modules that are imported, and what waits for others."""
    now = {seam: seam.current() for seam in SEAMS if seam.module in LOADED}
    return now, imports.waiting()


LOADED = {HEAD.module, "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer"}


class User:
    def __init__(self) -> None:
        self.budget: object = "own"  # no patch
        self.blocks: list[tuple] = []

    def step(self, what, *details) -> None:
        getattr(self, what)(*details)
        standing = {seam: x for seam, x in held()[0].items() if isinstance(x, Replacement)}
        assert bool(standing) == (self.budget != "own")
        assert not any(isinstance(x.original, Replacement) for x in standing.values())
        if standing:
            assert HEAD.current().own.budget == self.budget

    def patch(self, options) -> None:
        fastpo.patch(**options)
        self.budget = options.get("budget")

    def wrong(self, options) -> None:
        before = held()
        with pytest.raises((ValueError, TypeError)):
            fastpo.patch(**options)
        assert held() == before, "a patch that fails changes nothing"

    def unpatch(self) -> None:
        fastpo.unpatch()
        self.budget = "own"

    def subclass(self) -> None:
        """Its methods that call TRL's are those of its base, whenever it was made."""
        made = type("Mine", (trl.DPOTrainer,), {})
        for name in ("_compute_loss", "compute_loss"):
            assert getattr(made, name, None) == getattr(trl.DPOTrainer, name, None)

    def enter(self, options) -> None:
        stack, before = contextlib.ExitStack(), (held(), self.budget)
        stack.enter_context(fastpo.patched(**options))
        self.blocks.append((stack, *before))
        self.budget = options.get("budget")

    def leave(self, fails) -> None:
        if not self.blocks:
            return
        stack, before, self.budget = self.blocks.pop()
        error = ZeroDivisionError() if fails else None
        stack.__exit__(type(error) if fails else None, error, None)
        assert held() == before


@given(steps=STEPS)
def test_any_order(steps):
    assert trl.DPOTrainer and trl.KTOTrainer  # TRL imports a trainer when it is asked for
    own, user = held(), User()
    with contextlib.ExitStack() as stack:
        stack.callback(fastpo.unpatch)
        for step in steps:
            user.step(*step)
        while user.blocks:
            user.step("leave", False)
    assert held() == own

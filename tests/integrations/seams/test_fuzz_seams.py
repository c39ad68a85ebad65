"""Any order of patching, giving back, importing, subclassing: what was said last stands."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo.integrations.seams import imports
from fastpo.integrations.seams.seam import Method, Seam, kept, replace_when_imported, restore

SOURCE = "class Trainer:\n    def loss(self, inputs):\n        return ('own', inputs)\n"
MODULES = ("first", "second")
SEAMS = {name: Seam(f"strange.{name}", "Trainer.loss", ("inputs",), ("1.0",)) for name in MODULES}


class Tagged(Method):
    tag = 0

    def __call__(self, trainer, inputs):
        return (self.tag, *self.original(trainer, inputs))


def patch(tag):
    made = type("Tagged", (Tagged,), {"tag": tag})
    replace_when_imported(dict.fromkeys(SEAMS.values(), made))


TAGS = st.integers(1, 9)
STEPS = st.lists(
    st.tuples(st.just("patch"), TAGS)
    | st.tuples(st.just("unpatch"))
    | st.tuples(st.just("import"), st.sampled_from(MODULES))
    | st.tuples(st.just("subclass"), st.sampled_from(MODULES), st.booleans())
    | st.tuples(st.just("enter"), TAGS)
    | st.tuples(st.just("leave")),
    max_size=12,
)


class User:
    """A script's view, and what it should see: the tag that stands, or None."""

    def __init__(self) -> None:
        self.tag: int | None = None
        self.blocks: list[tuple[contextlib.ExitStack, int | None]] = []
        self.classes: list[type] = []

    def step(self, what, *details) -> None:
        getattr(self, what.replace("import", "load"))(*details)
        expected = ("own", 1) if self.tag is None else (self.tag, "own", 1)
        for one in self.classes:
            assert one().loss(1) == expected
        for name, seam in SEAMS.items():
            assert any(one.__module__ == f"strange.{name}" for one in self.classes) == (
                seam.module in sys.modules
            )

    def patch(self, tag) -> None:
        patch(tag)
        self.tag = tag

    def unpatch(self) -> None:
        restore(*SEAMS.values())
        self.tag = None

    def load(self, name) -> type:
        trainer = importlib.import_module(f"strange.{name}").Trainer
        self.classes.append(trainer)
        return trainer

    def subclass(self, name, overrides) -> None:
        own = {"loss": lambda self, inputs: super(made, self).loss(inputs)} if overrides else {}
        made = type("Mine", (self.load(name),), own)
        self.classes.append(made)

    def enter(self, tag) -> None:
        stack, before = contextlib.ExitStack(), self.tag
        stack.enter_context(kept(*SEAMS.values()))
        self.blocks.append((stack, before))
        self.patch(tag)

    def leave(self) -> None:
        if self.blocks:
            stack, self.tag = self.blocks.pop()
            stack.close()


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    (folder / "strange").mkdir()
    for name in ("__init__", *MODULES):
        (folder / "strange" / f"{name}.py").write_text("" if name == "__init__" else SOURCE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        yield


def forget() -> None:
    restore(*SEAMS.values())
    for name in ("strange", *(seam.module for seam in SEAMS.values())):
        sys.modules.pop(name, None)


@given(steps=STEPS)
def test_any_order(strange, steps):
    forget()
    finders, user = list(sys.meta_path), User()
    for step in steps:
        user.step(*step)
    while user.blocks:
        user.step("leave")
    user.step("unpatch")
    assert imports.waiting() == {} and sys.meta_path == finders
    for name in MODULES:
        user.step("import", name)
    forget()

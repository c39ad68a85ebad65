"""Seams: checked before anything is touched, and given back."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from importlib import metadata
from types import ModuleType

import pytest

from fastpo.integrations.seams import imports
from fastpo.integrations.seams.seam import (
    Method,
    Replacement,
    Seam,
    fitting,
    kept,
    replace,
    replace_when_imported,
    restore,
)


class Head:
    def forward(ctx, hidden, weight):
        """The signature a seam relies on."""


def switch(device):
    """Another."""


VERSIONS = ("8.0", "8.1")
HEAD = Seam("foreign.utils", "Head", ("hidden", "weight"), VERSIONS, member="forward")
SWITCH = Seam("foreign.utils", "switch", ("device",), VERSIONS, optional=True)


@pytest.fixture
def foreign(monkeypatch):
    """The package `foreign` with one module, both without a version."""
    module = ModuleType("foreign.utils")
    module.Head, module.switch = Head, switch
    monkeypatch.setitem(sys.modules, "foreign", ModuleType("foreign"))
    monkeypatch.setitem(sys.modules, "foreign.utils", module)
    return module


def test_replaced_and_given_back(foreign):
    replace({HEAD: Replacement, SWITCH: Replacement})
    assert foreign.Head.original is Head
    assert foreign.switch.original is switch
    replace({HEAD: Replacement, SWITCH: Replacement})
    assert foreign.Head.original is Head, "a replacement of a replacement hides the original"
    HEAD.restore()
    SWITCH.restore()
    HEAD.restore()
    assert foreign.Head is Head
    assert foreign.switch is switch


def test_kept_restores_what_was_there(foreign):
    replace({HEAD: Replacement})
    outer = foreign.Head
    with kept(HEAD, SWITCH):
        replace({HEAD: Replacement, SWITCH: Replacement})
        assert foreign.Head is not outer
    assert foreign.Head is outer
    assert foreign.switch is switch


def test_an_optional_name_may_be_missing(foreign):
    del foreign.switch
    replace({HEAD: Replacement, SWITCH: Replacement})
    assert not hasattr(foreign, "switch")
    assert isinstance(foreign.Head, Replacement)


def changed_head(module):
    module.Head = type("Head", (), {"forward": lambda ctx, hidden, weight, bias: None})


def no_head(module):
    module.Head = None


def changed_switch(module):
    module.switch = lambda: None


CHANGES = {
    changed_head: r"Head: expected \(hidden, weight\), got \(hidden, weight, bias\)",
    no_head: r"Head: expected \(hidden, weight\), got nothing",
    changed_switch: r"switch: expected \(device\), got \(\)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_signature_leaves_everything_alone(foreign, change):
    change(foreign)
    before = dict(vars(foreign))
    works = r"; foreign is not installed, fastpo works with foreign 8.0 and 8.1"
    with pytest.raises(RuntimeError, match=r"foreign\.utils\." + CHANGES[change] + works):
        replace({HEAD: Replacement, SWITCH: Replacement})
    assert vars(foreign) == before


@pytest.mark.parametrize(
    ("installed", "expected"),
    [("8.9.1", ["old"]), ("8.10.0", ["both"]), ("8.11.0rc1", ["both", "new"])],
)
def test_seams_of_the_installed_version(installed, expected, monkeypatch):
    """A version newer than all is taken for the newest, as is one that nothing says."""
    named = {"old": ("8.9",), "both": ("8.10", "8.11"), "new": ("8.11",)}
    seams = {Seam("foreign.utils", name, (), named[name]): Replacement for name in named}
    found = {}
    for version in (installed, "9.0", None):

        def answer(package, version=version):
            if version is None:
                raise metadata.PackageNotFoundError(package)
            return version

        monkeypatch.setattr(metadata, "version", answer)
        found[version] = [seam.name for seam in fitting(seams)]
    assert found == {installed: expected, "9.0": ["both", "new"], None: ["both", "new"]}


def test_a_version_older_than_all_seams(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: "7.12.3")
    message = r"foreign: expected version 8\.0 or 8\.1, got 7\.12\.3"
    with pytest.raises(RuntimeError, match=message):
        fitting({HEAD: Replacement, SWITCH: Replacement})


def test_a_missing_package():
    absent = Seam("no_such_package.utils", "Head", (), VERSIONS)
    message = (
        r"no_such_package.utils: No module named 'no_such_package'; "
        r"no_such_package is not installed, fastpo works with no_such_package 8.0 and 8.1"
    )
    with pytest.raises(RuntimeError, match=message):
        replace({absent: Replacement})
    absent.restore()
    assert "no_such_package" not in sys.modules


class Trainer:
    def loss(self, model, inputs):
        """A method, and its signature."""
        return ("own", model, inputs)


class Doubled(Method):
    def __call__(self, trainer, model, inputs):
        return ("ours", *self.original(trainer, model, inputs))


LOSS = Seam("foreign.trainer", "Trainer.loss", ("model", "inputs"), VERSIONS)


def test_a_method_reaches_subclasses_defined_before(foreign, monkeypatch):
    module = ModuleType("foreign.trainer")
    module.Trainer = type("Trainer", (), {"loss": Trainer.loss})
    monkeypatch.setitem(sys.modules, "foreign.trainer", module)
    before = vars(module.Trainer)["loss"]
    earlier = type("Sub", (module.Trainer,), {})()
    replace({LOSS: Doubled})
    assert earlier.loss(1, inputs=2) == ("ours", "own", 1, 2)
    assert inspect.signature(module.Trainer.loss) == inspect.signature(Trainer.loss)
    replace({LOSS: Doubled})
    assert earlier.loss(1, 2) == ("ours", "own", 1, 2), "never a replacement of a replacement"
    restore(LOSS)
    assert vars(module.Trainer)["loss"] is before
    assert earlier.loss(1, 2) == ("own", 1, 2)


def test_an_inherited_method_is_not_the_class_s_own(foreign, monkeypatch):
    module = ModuleType("foreign.trainer")
    module.Trainer = type("Trainer", (Trainer,), {})
    monkeypatch.setitem(sys.modules, "foreign.trainer", module)
    with pytest.raises(
        RuntimeError, match=r"Trainer\.loss: expected \(model, inputs\), got nothing"
    ):
        replace({LOSS: Doubled})


SOURCE = (
    "class Trainer:\n    def loss(self, model, inputs):\n        return ('own', model, inputs)\n"
)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A package `foreign` on disk with a module `trainer` that has not been imported."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "__init__.py").write_text("")
    (tmp_path / "foreign" / "trainer.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("foreign", "foreign.trainer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    finders = list(sys.meta_path)
    yield
    restore(LOSS)
    assert sys.meta_path == finders, "nothing of ours stays in the import system"
    for name in ("foreign", "foreign.trainer"):
        sys.modules.pop(name, None)


def test_a_module_is_replaced_when_it_is_imported(importable):
    replace_when_imported({LOSS: Doubled})
    assert "foreign.trainer" not in sys.modules
    module = importlib.import_module("foreign.trainer")
    assert module.Trainer().loss(1, 2) == ("ours", "own", 1, 2)
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert module.__loader__ is module.__spec__.loader
    restore(LOSS)
    assert module.Trainer().loss(1, 2) == ("own", 1, 2)


def test_what_is_replaced_looks_as_it_did(importable):
    replace_when_imported({LOSS: Doubled})
    loader = importlib.util.find_spec("foreign.trainer").loader
    assert loader.get_source("foreign.trainer") == SOURCE and not loader.is_package(
        "foreign.trainer"
    )
    loss = importlib.import_module("foreign.trainer").Trainer.loss
    assert inspect.getfullargspec(loss).args == ["self", "model", "inputs"]
    assert loss.__code__.co_name == "loss" and loss.__defaults__ is None
    assert copy.copy(loss).original is loss.original


def test_what_waits_is_forgotten(importable):
    replace_when_imported({LOSS: Doubled})
    restore(LOSS)
    assert importlib.import_module("foreign.trainer").Trainer().loss(1, 2) == ("own", 1, 2)


def test_kept_gives_back_what_was_imported_inside(importable):
    with kept(LOSS):
        replace_when_imported({LOSS: Doubled})
        module = importlib.import_module("foreign.trainer")
        assert module.Trainer().loss(1, 2)[0] == "ours"
    assert module.Trainer().loss(1, 2)[0] == "own"


def test_a_changed_method_fails_its_import(importable, tmp_path):
    changed = SOURCE.replace("inputs", "batch")
    (tmp_path / "foreign" / "trainer.py").write_text(changed)
    replace_when_imported({LOSS: Doubled})
    with pytest.raises(RuntimeError, match=r"Trainer\.loss: expected \(model, inputs\), got"):
        importlib.import_module("foreign.trainer")


def test_an_action_runs_once_or_is_tried_again(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    runs = []

    def action():
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("not yet")

    imports.after("imported_late", action)
    try:
        with pytest.raises(RuntimeError, match="not yet"):
            importlib.import_module("imported_late")
        for _ in range(2):
            importlib.import_module("imported_late")
            sys.modules.pop("imported_late")
        assert len(runs) == 2 and "imported_late" not in imports.waiting()
    finally:
        imports.forget("imported_late")


def test_kept_waits_again(tmp_path, monkeypatch):
    """For what was forgotten inside; what was imported inside is acted on now."""
    for name in ("still_waiting", "imported_inside"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    runs = []
    imports.after("still_waiting", lambda: runs.append("still_waiting"))
    imports.after("imported_inside", lambda: runs.append("imported_inside"))
    try:
        with kept():
            imports.forget("still_waiting")
            imports.forget("imported_inside")
            importlib.import_module("imported_inside")
        assert runs == ["imported_inside"] and "still_waiting" in imports.waiting()
    finally:
        imports.forget("still_waiting")
        sys.modules.pop("imported_inside", None)

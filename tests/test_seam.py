"""Seams: checked before anything is touched, and given back."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from fastpo.integrations._seam import Replacement, Seam, kept, replace


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

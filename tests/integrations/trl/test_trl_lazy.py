"""Lazy logits under TRL's trainers: all there is for releases without seams, and beside these."""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields
from importlib import metadata

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.lazy import cell, everywhere
from fastpo.integrations.trl import light
from fastpo.integrations.trl.head import GATHER

GENERATION = {"num_generations": 2, "max_completion_length": 4}


pytestmark = pytest.mark.usefixtures("afresh")


def pretend(monkeypatch, version):
    own = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "trl" else own(name))


def is_lazy():
    return everywhere._Switch.options is not None


def test_an_older_trl_is_served_by_lazy_logits(monkeypatch, caplog):
    pretend(monkeypatch, "0.24.0")
    fastpo.patch()
    assert is_lazy()
    assert "lazy logits serve" in caplog.text and "got 0.24.0" in caplog.text
    for options in ({"objective": "dpo"}, {"shared_prompts": True}):
        with pytest.raises(RuntimeError, match=r": expected version .*, got (0\.24\.0|4)"):
            fastpo.patch(**options)
    fastpo.unpatch()
    assert not is_lazy()


@pytest.mark.parametrize("seam", ["at once", "when imported"])
def test_a_newer_trl_of_other_seams_is_served_by_lazy_logits(seam, monkeypatch, caplog):
    pytest.importorskip("trl", minversion="1.15")
    one = GATHER if seam == "at once" else next(iter(light.replacements()))
    importlib.import_module(one.module)
    owner, _, name = one.name.rpartition(".")
    module = sys.modules[one.module]
    monkeypatch.setattr(getattr(module, owner) if owner else module, name, lambda other: other)
    with pytest.raises(RuntimeError, match=r"expected .*, got \("):
        fastpo.patch()
    fastpo.unpatch()
    pretend(monkeypatch, "1.99.0")
    fastpo.patch()
    assert is_lazy() and "lazy logits serve" in caplog.text


def test_without_trl_lazy_logits_are_there_when_asked_for(monkeypatch):
    own = metadata.version

    def missing(name):
        if name == "trl":
            raise metadata.PackageNotFoundError(name)
        return own(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setitem(sys.modules, GATHER.module, None)
    with pytest.raises(RuntimeError, match="trl is not installed"):
        fastpo.patch()
    fastpo.patch(lazy=True)
    assert is_lazy()


def rewarded():
    return {"reward_funcs": _trainers.reward}


def taught():
    return {"teacher_model": tiny.model("llama", seed=1)}


# name: TRL's prefix, rows, config on top, arguments of the trainer
TRAINERS = {
    "dpo": ("DPO", tiny.preferences, {"max_length": 64}, dict),
    "dpo_ipo": ("DPO", tiny.preferences, {"loss_type": "ipo", "beta": 0.3}, dict),
    "kto": ("KTO", tiny.unpaired, {"max_length": 64}, dict),
    "cpo": ("CPO", tiny.preferences, {"max_length": 64}, dict),
    "simpo": (
        "CPO",
        tiny.preferences,
        {"loss_type": "simpo", "cpo_alpha": 0.0, "max_length": 64},
        dict,
    ),
    "orpo": ("ORPO", tiny.preferences, {"max_length": 64}, dict),
    "sft": ("SFT", tiny.conversations, {"max_length": 64}, dict),
    "grpo": ("GRPO", tiny.prompts, {**GENERATION, "beta": 0.1, "temperature": 0.8}, rewarded),
    "rloo": ("RLOO", tiny.prompts, GENERATION, rewarded),
    "gkd": ("GKD", tiny.conversations, {"lmbda": 0.0, "max_length": 64}, taught),
}


def train(name, folder):
    prefix, rows, changes, arguments = TRAINERS[name]
    try:
        _trainers.module(prefix)
    except ImportError as error:
        pytest.skip(str(error))
    known = {field.name for field in fields(getattr(_trainers.module(prefix), f"{prefix}Config"))}
    if "num_generations" in changes and "num_generations" not in known:
        pytest.skip("of this release another trainer has the name")
    if "max_prompt_length" in known:
        changes = {**changes, "max_prompt_length": 32}
    path = _trainers.saved(folder)
    return _trainers.train(_trainers.build(prefix, folder, path, rows(), changes, **arguments()))


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path):
    own = train(name, tmp_path)
    with fastpo.patched(lazy=True):
        ours = train(name, tmp_path)
    assert not cell.told
    _trainers.assert_same(ours, own)

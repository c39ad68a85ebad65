"""`fastpo.patch` comes and goes: before or after TRL, around its subclasses, nested, repeated."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.seams import imports
from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.seams.seam import Replacement, fitting
from fastpo.integrations.trl.head import HEAD
from fastpo.integrations.trl.patch import SEAMS


@pytest.fixture(autouse=True)
def unpatched():
    """What fails here must not leave the tests after it patched."""
    yield
    fastpo.unpatch()


def held():
    """What stands at every seam of this TRL, its module imported."""
    found = {}
    for seam in fitting(dict.fromkeys(SEAMS, Replacement)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL's notice that its experiments may change
            try:
                importlib.import_module(seam.module)
            except ImportError:  # of what an experiment needs
                continue
        if seam.current() is not None:
            found[seam] = seam.current()
    return found


def assert_held(expected):
    assert all(seam.current() is value for seam, value in expected.items())


def test_every_seam_is_given_back():
    pytest.importorskip("trl", minversion="1.15")  # before, not all options have their seams
    fastpo.unpatch()  # models that other tests have left lazy hold one of these seams
    own = held()
    assert len(own) > 20
    assert not any(isinstance(value, Replacement) for value in own.values())
    all_of_them = {"shared_prompts": True, "whole_groups": True, "support": True}
    for _ in range(2):
        fastpo.patch(**all_of_them)
        for seam, value in own.items():
            assert isinstance(seam.current(), Replacement), seam
            assert seam.current().original is value, seam
    outer = {seam: seam.current() for seam in own}
    with fastpo.patched(**all_of_them), fastpo.patched(budget=7, **all_of_them):
        assert all(seam.current().original is value for seam, value in own.items())
        assert HEAD.current().own.budget == 7
    assert_held(outer)
    with pytest.raises(ZeroDivisionError), fastpo.patched():
        raise ZeroDivisionError
    assert_held(outer)
    with fastpo.patched():
        fastpo.unpatch()
        assert_held(own)
    assert_held(outer)
    for _ in range(2):
        fastpo.unpatch()
        assert_held(own)


class Halved(trl.DPOTrainer):
    """A script's own trainer, defined before any patch: it calls what it overrides."""

    def _compute_loss(self, model, inputs, return_outputs):
        return super()._compute_loss(model, inputs, return_outputs) / 2


@pytest.mark.parametrize("built", ["inside", "before"])
def test_a_subclass_defined_before(built, tmp_path, monkeypatch):
    """Also where the trainer itself was built before: what it calls is looked up when it does."""
    monkeypatch.setattr(trl, "DPOTrainer", Halved)
    path = _trainers.saved(tmp_path)
    calls = tiny.count_calls(monkeypatch)

    def build():
        return _trainers.build("DPO", tmp_path, path, tiny.preferences(), {})

    own = _trainers.train(build())
    assert not calls
    early = build() if built == "before" else None
    with fastpo.patched():
        ours = _trainers.train(early or build())
    assert calls
    _trainers.assert_same(ours, own)


LATE = [
    ({"objective": "simpo"}, "objective"),
    ({"shared_prompts": True}, "shared_prompts"),
    ({"objective": "simpo", "padding_free": True}, "objective and padding_free"),
    ({}, None),
]


@pytest.mark.parametrize(("options", "lacks"), LATE)
@pytest.mark.parametrize("late", [True, False])
def test_a_trainer_built_before_says_what_it_lacks(options, lacks, late, tmp_path, caplog):
    pytest.importorskip("trl", minversion="1.15")
    path = _trainers.saved(tmp_path)
    early = _trainers.build("DPO", tmp_path, path, tiny.preferences(), {}) if late else None
    say_once.cache_clear()
    with fastpo.patched(**options), caplog.at_level(logging.WARNING, "fastpo"):
        _trainers.train(early or _trainers.build("DPO", tmp_path, path, tiny.preferences(), {}))
    said = [record.getMessage() for record in caplog.records if "built" in record.getMessage()]
    why = f"it was built before fastpo.patch, and trains without {lacks}"
    assert said == [f"fastpo: DPOTrainer: {why}"] * (late and lacks is not None)


@pytest.mark.parametrize("options", [{"objective": "simpo"}, {"shared_prompts": True}])
def test_a_second_patch_of_the_same_lacks_nothing(options, tmp_path, caplog):
    """As of a notebook's cell that is run again."""
    pytest.importorskip("trl", minversion="1.15")
    path = _trainers.saved(tmp_path)
    with fastpo.patched(**options), caplog.at_level(logging.WARNING, "fastpo"):
        trainer = _trainers.build("DPO", tmp_path, path, tiny.preferences(), {})
        fastpo.patch(**options)
        _trainers.train(trainer)
    assert not [record for record in caplog.records if "built" in record.getMessage()]


FLAGS = [
    "lazy",
    "shared_prompts",
    "padding_free",
    "whole_groups",
    "support",
    "reference_free",
    "score_prompts",
]


@pytest.mark.parametrize("name", FLAGS)
def test_a_word_in_place_of_a_flag_changes_nothing(name):
    own = held()
    with pytest.raises(ValueError, match=f"{name}: expected True or False, got 'no'"):
        fastpo.patch(**{name: "no"})
    assert_held(own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": float("nan")}, "mixing: expected a finite number or None, got nan"),
        ({"mixing": True}, "mixing: expected a finite number or None, got True"),
        ({"mixing": "half"}, "mixing: expected a finite number or None, got 'half'"),
        ({"alternatives": 0}, "alternatives: expected an integer >= 1, got 0"),
        ({"alternatives": 2.0}, "alternatives: expected an integer >= 1, got 2.0"),
        (
            {"shared_prompts": True, "padding_free": True},
            "padding_free: expected False with shared_prompts=True, got True",
        ),
        ({"whole_groups": True}, "whole_groups: expected shared_prompts=True with it, got False"),
    ],
)
def test_an_option_that_cannot_be_changes_nothing(options, message):
    own = held()
    with pytest.raises(ValueError, match=f"^{message}$"):
        fastpo.patch(**options)
    assert_held(own)


@pytest.mark.parametrize("options", [{"reference_free": True}, {"references": {"prev": None}}])
def test_an_option_of_an_objective_without_one(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: .* objective= with it"):
        fastpo.patch(**options)


def test_references_without_names():
    with pytest.raises(ValueError, match=r"^references: expected models by name, .* got a list$"):
        fastpo.patch(objective="inpo", references=[torch.nn.Linear(1, 1)])


@pytest.mark.parametrize(
    ("objective", "references", "message"),
    [
        ("inpo", {"prev": 2}, "'prev'.: expected one model, got 2"),
        ("inpo", {"prev": 0}, "'prev'.: expected one model, got 0"),
        ("dpo", {"ref": 1}, " expected prev and history, got ref"),
        ("mnpo", {"history": 0}, "'history'.: expected at least one model, got 0"),
        ("inpo", {"prev": 1, "history": 1}, r"'history'.: expected an objective of history_\*_log"),
        ("kto", {"prev": 1}, r"'prev'.: expected an objective of prev_\*_logps, got one of lograt"),
    ],
)
def test_references_that_nothing_would_come_of(objective, references, message):
    own = held()
    models = {name: [torch.nn.Linear(1, 1)] * count for name, count in references.items()}
    with pytest.raises(ValueError, match=f"^references.{message}"):
        fastpo.patch(objective=objective, references=models)
    assert_held(own)


@pytest.mark.parametrize(
    ("objective", "option", "message"),
    [
        ("simpo", {"mixing": 0.5}, r"mixing: expected .* of mixed_\*_logps, got one of chosen"),
        ("gspo", {"mixing": 0.5}, r"mixing: expected .* of mixed_\*_logps, got one of token_logps"),
        ("dpo", {"alternatives": 4}, "alternatives: expected .* of rejected_alternative_token_log"),
        ("simpo", {"reference_free": True}, r"reference_free: expected .* of \*logratios, got one"),
    ],
)
def test_options_that_nothing_would_come_of(objective, option, message):
    own = held()
    with pytest.raises(ValueError, match=f"^{message}"):
        fastpo.patch(objective=objective, **option)
    assert_held(own)


@pytest.mark.parametrize(
    ("loss_type", "got"), [("sigmoid", "TRL's own"), (["sigmoid", "simpo"], "one of chosen_logps")]
)
def test_a_mixture_that_no_loss_type_asks_for(loss_type, got, tmp_path):
    pytest.importorskip("trl", minversion="1.15")
    path, data = _trainers.saved(tmp_path), tiny.preferences()
    message = rf"^mixing: expected an objective of mixed_\*_logps, got {got}"
    with fastpo.patched(mixing=0.5):
        with pytest.raises(ValueError, match=message):
            _trainers.build("DPO", tmp_path, path, data, {"loss_type": loss_type})
        _trainers.build("DPO", tmp_path, path, data, {"loss_type": "spa"})


@pytest.mark.parametrize("prefix", ["DPO", "KTO", "GRPO"])
def test_an_argument_that_no_trainer_takes(prefix):
    """The error is Python's own, which names the trainer."""
    trainer = getattr(trl, f"{prefix}Trainer")
    with fastpo.patched(), pytest.raises(TypeError, match=f"{prefix}Trainer.* 'tokenizer'"):
        trainer(model="none", tokenizer=tiny.tokenizer())


def test_the_log_names_the_trainers_and_what_they_train(tmp_path, caplog):
    pytest.importorskip("trl", minversion="1.15")
    path, mixed = _trainers.saved(tmp_path), {"loss_type": ["simpo", "ipo"], "loss_weights": [1, 2]}
    with caplog.at_level(logging.INFO, "fastpo"), fastpo.patched():
        _trainers.build("DPO", tmp_path, path, tiny.preferences(), mixed)
    patch, trainer = (record.getMessage() for record in caplog.records)
    assert patch.startswith(f"fastpo: patch: trainers of TRL {trl.__version__}: ")
    assert ", dpo, " in patch and "lazy" not in patch
    simpo = "simpo(beta=2.0, gamma=1.0, label_smoothing=0.0)"
    assert trainer == f"fastpo: DPOTrainer: trains {simpo} + 2·TRL's ipo"


# What a script may do; after the import of TRL is what the tests above did.
ORDERS = {
    "before": "fastpo.patch(); import trl; from trl import DPOTrainer; fastpo.patch()",
    "between": "import trl; fastpo.patch(); assert not imported(); from trl import DPOTrainer",
}
PROGRAM = """
import sys
import fastpo

def imported():
    return "trl.trainer.dpo_trainer" in sys.modules

{order}
import trl.trainer.utils as utils
from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.seams.seam import Replacement

def at_seams():
    own = vars(DPOTrainer)
    return (utils._ChunkedLogProbFunction, own["__init__"], own["_compute_loss"])

assert all(isinstance(value, Replacement) for value in at_seams()), at_seams()
own = tuple(value.original for value in at_seams())
assert not any(isinstance(value, Replacement) for value in own)
fastpo.unpatch()
assert all(now is before for now, before in zip(at_seams(), own))
finders = [type(finder).__module__ for finder in sys.meta_path if not isinstance(finder, type)]
assert not any(name.startswith("fastpo") for name in finders), finders
"""


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_import(order):
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(order=ORDERS[order])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_nothing_of_fastpo_run_waits_after_unpatch():
    """It patches what a script imports later, TRL too."""
    with fastpo.patched():
        imports.after("verl", lambda: pytest.fail("patched again"))
        fastpo.unpatch()
        assert "verl" not in imports.waiting()

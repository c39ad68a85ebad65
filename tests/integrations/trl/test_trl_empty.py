"""Batches in which no completion has a token that counts: prompts alone reach `max_length`."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first whose parameters are NaN then
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
from _tiny import one_thread  # noqa: F401
from datasets import Dataset

import fastpo

# name: (trainer, config on top); their means of log-probabilities are 0/0
TRAINERS = {
    "simpo": ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "ipo": ("CPO", {"loss_type": "ipo"}),
    "alphapo": ("CPO", {"loss_type": "alphapo", "alpha": 0.1}),
    "orpo": ("ORPO", {}),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_training_goes_on(name, patched, tmp_path):
    """TRL's parameters are NaN after a step. docs/drop-in.md says both."""
    prefix, changes = TRAINERS[name]
    rows = [{"prompt": "what is it? " * 8, "chosen": "a colour", "rejected": "no"}] * 2
    with fastpo.patched() if patched else contextlib.nullcontext():
        built = _trainers.build(
            prefix,
            tmp_path,
            tiny.model(),
            Dataset.from_list(rows),
            {"max_steps": 1, "max_length": 8, **changes},
        )
        _, parameters = _trainers.train(built)
    assert {bool(p.isfinite().all()) for p in parameters.values()} == {patched}

"""Activation checkpointing, asked for without a warning of the installed transformers."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("transformers")

import _tiny as tiny
from transformers import TrainingArguments

from fastpo.integrations.checkpointing import argument, enable


def test_of_a_model():
    model = tiny.model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable(model)
    assert model.model.gradient_checkpointing or model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("wanted", [False, True])
def test_of_a_trainer(wanted, tmp_path):
    pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **argument(wanted))
    assert arguments.gradient_checkpointing is wanted

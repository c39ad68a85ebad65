"""Predictions of transformers' Trainer: logits, or an error by name, never something else."""

from __future__ import annotations

import copy
import gc

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import transformers
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.predictions import STEP

REFUSED = "predictions: expected logits of a Trainer's model, got one with a fastpo head"
IGNORED = ["logits", "past_key_values"]


def rows():
    columns = tiny.batch().values()
    return [dict(zip(tiny.batch(), row, strict=True)) for row in zip(*columns, strict=True)]


def shape(found):
    """A `compute_metrics` that says what it was given."""
    predictions = found.predictions
    return {"shape": None if isinstance(predictions, tuple) else predictions.shape}


def make_trainer(model, folder, *, compute_metrics=shape, compute_loss_func=None, **options):
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **settings),
        eval_dataset=rows(),
        compute_metrics=compute_metrics,
        compute_loss_func=compute_loss_func,
    )


def test_metrics_of_logits_are_refused(tmp_path):
    model = tiny.model("llama")
    words = model.config.vocab_size
    trainer = make_trainer(model, tmp_path)
    own = trainer.evaluate()
    assert own["eval_shape"] == (3, 12, words)
    handle = fastpo.attach(model)
    for call in (trainer.evaluate, lambda: trainer.predict(rows())):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert model(**tiny.batch()).logps.shape == (3, 11), "other calls are as before"
    assert trainer.evaluate(ignore_keys=IGNORED)["eval_shape"] == (3, 11)
    handle.detach()
    assert trainer.evaluate()["eval_shape"] == (3, 12, words)


def test_nor_of_a_copy_s(tmp_path):
    model = tiny.model("llama")
    with fastpo.attach(model):
        twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=REFUSED):
        make_trainer(twin, tmp_path).evaluate()


def test_losses_alone_are_not(tmp_path):
    model = tiny.model("llama")
    trainers = [
        make_trainer(model, tmp_path, compute_metrics=None),
        make_trainer(model, tmp_path, prediction_loss_only=True),
    ]
    own = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    fastpo.attach(model)
    found = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert found == pytest.approx(own, rel=1e-5)


def test_nor_logits_where_the_trainer_keeps_the_labels(tmp_path):
    """A loss of the script's own reads logits, and so may its metrics."""

    def mean_loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    model = tiny.model("llama")
    trainer = make_trainer(model, tmp_path, compute_loss_func=mean_loss)
    own = trainer.evaluate()
    fastpo.attach(model)
    found = trainer.evaluate()
    assert found["eval_shape"] == own["eval_shape"]
    assert found["eval_loss"] == pytest.approx(own["eval_loss"])


def test_the_trainer_is_given_back():
    gc.collect()  # models of other tests
    own = STEP.read()
    first, second = fastpo.attach(tiny.model("llama")), fastpo.attach(tiny.model("phi"))
    assert STEP.current() is not own
    first.detach()
    assert STEP.current() is not own
    second.detach()
    second.detach()
    assert STEP.current() is own
    del first, second
    fastpo.attach(tiny.model("llama"))  # forgotten
    gc.collect()
    with fastpo.attach(tiny.model("llama")):
        assert STEP.current().original is own
    assert STEP.current() is own

"""`fastpo.patch` under models of many families: one step gives the same loss and parameters."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import transformers
from _tiny import one_thread  # noqa: F401

import fastpo


def resized():
    """Two special tokens more, and rows that no token has, as `pad_to_multiple_of` leaves them."""
    model = tiny.model("llama")
    model.resize_token_embeddings(len(tiny.tokenizer()) + 2, pad_to_multiple_of=64)
    return model


MODELS = {
    **{name: lambda name=name: tiny.model(name) for name in tiny.MODELS},
    "resized": resized,
    "llava_text_only": tiny.vision_language_model,
}
TRAINERS = {"DPO": tiny.preferences, "SFT": tiny.conversations}


@pytest.mark.parametrize("prefix", TRAINERS)
@pytest.mark.parametrize("name", MODELS)
def test_models_train_the_same(name, prefix, tmp_path, monkeypatch):
    path = tmp_path / "model"
    MODELS[name]().save_pretrained(path)
    data, calls, runs = TRAINERS[prefix](), tiny.count_calls(monkeypatch), []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            trainer = _trainers.build(prefix, tmp_path, str(path), data, {"max_steps": 2})
            runs.append(_trainers.train(trainer))
        assert bool(calls) == patched
    (own_logs, own), (logs, ours) = runs
    assert len(logs) == len(own_logs) == 3
    for log, own_log in zip(logs, own_logs, strict=True):
        assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def test_quantised_base(tmp_path):
    """QLoRA: the head stays a float."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    peft = pytest.importorskip("peft")
    path = tmp_path / "model"
    tiny.model("llama").save_pretrained(path)
    runs = []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            trainer = _trainers.build(
                "DPO",
                tmp_path,
                str(path),
                tiny.preferences(),
                {"max_steps": 2},
                peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]),
                quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
            )
            runs.append(_trainers.train(trainer))
    (own_logs, own), (logs, ours) = runs
    for log, own_log in zip(logs, own_logs, strict=True):
        assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)

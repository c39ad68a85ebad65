"""`fastpo.patch` under models of many families: two steps give the same losses and parameters."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import transformers
from _tiny import one_thread  # noqa: F401
from torch import nn

import fastpo


def resized():
    """Two special tokens more, and rows that no token has, as `pad_to_multiple_of` leaves them."""
    model = tiny.model("llama")
    model.resize_token_embeddings(len(tiny.tokenizer()) + 2, pad_to_multiple_of=64)
    return model


MODELS = {
    **{name: lambda name=name: tiny.model(name) for name in tiny.MODELS},
    "resized": resized,
    "llava": tiny.vision_language_model,
}
TRAINERS = ("DPO", "SFT")


@pytest.fixture
def calls(monkeypatch):
    return tiny.count_calls(monkeypatch)


SAMPLED = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1, "num_iterations": 2}


def trainer(prefix, folder, model, **arguments):
    data = arguments.pop("data", None) or _trainers.DATA[prefix]()
    changes = {"max_steps": 2, **(SAMPLED if "reward_funcs" in arguments else {})}
    return _trainers.build(prefix, folder, model, data, changes, **arguments)


@pytest.mark.parametrize("prefix", TRAINERS)
@pytest.mark.parametrize("name", MODELS)
def test_models_train_the_same(name, prefix, tmp_path, calls):
    path = tmp_path / "model"
    MODELS[name]().save_pretrained(path)
    _trainers.assert_trains_the_same(lambda: trainer(prefix, tmp_path, str(path)), calls)


@pytest.mark.parametrize("prefix", [*TRAINERS, "GRPO", "RLOO"])
def test_images(prefix, tmp_path, monkeypatch, calls):
    pytest.importorskip("PIL")
    path, seen = tmp_path / "model", []
    tiny.vision_language_model().save_pretrained(path)
    forward = transformers.CLIPVisionModel.forward

    def watched(self, *args, **kwargs):
        seen.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.CLIPVisionModel, "forward", watched)
    arguments = {
        "data": tiny.with_images(_trainers.DATA[prefix]()),
        "processing_class": tiny.processor(),
    }
    if prefix in ("GRPO", "RLOO"):
        pytest.importorskip("trl", minversion="1.15")  # before, not tried
        arguments["reward_funcs"] = _trainers.reward
    _trainers.assert_trains_the_same(
        lambda: trainer(prefix, tmp_path, str(path), **arguments), calls
    )
    assert len(seen) >= 4


def new_head():
    """One of the script's own, with a bias, where the embeddings had been tied."""
    model = tiny.model("llama_tied")
    model.config.tie_word_embeddings = False
    words, hidden = model.get_input_embeddings().weight.shape
    model.set_output_embeddings(nn.Linear(hidden, words))
    return model


def dispatched():
    """With the hooks that `device_map` leaves on every part."""
    accelerate = pytest.importorskip("accelerate")
    places = {"model": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(
        tiny.model("llama"), places, main_device="cpu", force_hooks=True
    )


def test_a_reference_partly_on_disk(tmp_path, calls):
    """A layer of it is read from there for every pass; what is trained stays in memory."""
    accelerate = pytest.importorskip("accelerate")

    def build():
        reference = tiny.model("llama", seed=1)
        places = {name: "cpu" for name, _ in reference.model.named_children() if name != "layers"}
        places |= {"layers.0": "cpu", "layers.1": "disk"}
        places = {"lm_head": "cpu", **{f"model.{name}": place for name, place in places.items()}}
        reference = accelerate.dispatch_model(
            reference, places, main_device="cpu", offload_dir=str(tmp_path / "layers")
        )
        assert reference.model.layers[1].mlp.up_proj.weight.is_meta
        return trainer("DPO", tmp_path, _trainers.saved(tmp_path), ref_model=reference)

    _trainers.assert_trains_the_same(build, calls)


@pytest.mark.parametrize("prefix", TRAINERS)
@pytest.mark.parametrize("make", [new_head, dispatched])
def test_models_changed_in_memory(make, prefix, tmp_path, calls):
    """TRL is given the model itself."""
    if (make, prefix) == (dispatched, "SFT"):
        why = "TRL's SFTTrainer refuses a forward that accelerate has wrapped"
        pytest.importorskip("trl", minversion="1.15", reason=why)

    def build():
        reference = {"ref_model": make()} if prefix == "DPO" else {}
        return trainer(prefix, tmp_path, make(), **reference)

    _trainers.assert_trains_the_same(build, calls)


def test_quantised_base(tmp_path, calls):
    """QLoRA: the head stays a float."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    path = _trainers.saved(tmp_path)
    arguments = {
        "peft_config": _trainers.lora(),
        "quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True),
    }
    _trainers.assert_trains_the_same(lambda: trainer("DPO", tmp_path, path, **arguments), calls)


def test_a_third_text_beside_images(tmp_path):
    pytest.importorskip("trl", minversion="1.15")
    pytest.importorskip("PIL")
    tiny.vision_language_model().save_pretrained(tmp_path / "model")
    data = tiny.with_images(tiny.preferences()).map(lambda row: {"third": row["rejected"]})
    given = {"data": data, "processing_class": tiny.processor()}
    message = "third: expected a dataset of texts alone, got 'images'"
    with fastpo.patched(objective="tpo_triple"), pytest.raises(ValueError, match=message):
        trainer("DPO", tmp_path, str(tmp_path / "model"), **given)


@pytest.mark.parametrize(("scored", "dataset"), [(False, "train"), (True, "test")])
def test_columns_beside_images(scored, dataset, tmp_path):
    """Of every dataset before the training, though TRL prepares none of these."""
    pytest.importorskip("trl", minversion="1.15")
    pytest.importorskip("PIL")
    tiny.vision_language_model().save_pretrained(tmp_path / "model")
    lacking = tiny.with_images(tiny.preferences())
    whole = lacking.map(lambda _: {"chosen_scores": 1.0, "rejected_scores": 0.0})
    given = {
        "data": whole if scored else lacking,
        "eval_dataset": {"whole": whole, "test": lacking},
        "processing_class": tiny.processor(),
    }
    message = f"chosen_scores: expected a dataset column .* in dataset '{dataset}'"
    with fastpo.patched(objective="odpo"), pytest.raises(ValueError, match=message):
        trainer("DPO", tmp_path, str(tmp_path / "model"), **given)


@pytest.mark.parametrize(("prefix", "objective"), [("DPO", "dpo"), ("KTO", "kto")])
def test_objectives_by_name_see_images(prefix, objective, tmp_path, calls):
    """The reference, too, of which TRL's KTOTrainer asks the texts alone."""
    pytest.importorskip("trl", minversion="1.15")
    pytest.importorskip("PIL")
    path = tmp_path / "model"
    tiny.vision_language_model().save_pretrained(path)
    reference = tiny.vision_language_model(seed=1)
    given = {
        "data": tiny.with_images(_trainers.DATA[prefix]()),
        "processing_class": tiny.processor(),
        "ref_model": reference,
    }
    own = _trainers.train(trainer(prefix, tmp_path, str(path), **given))
    with fastpo.patched(objective=objective):
        ours = _trainers.train(trainer(prefix, tmp_path, str(path), **given))
    assert calls
    _trainers.assert_same(ours, own)


def test_groups_beside_images(tmp_path):
    pytest.importorskip("trl", minversion="1.15")
    pytest.importorskip("PIL")
    data = tiny.with_images(tiny.preferences()).map(
        lambda row: {"completions": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]}
    )
    with pytest.raises(ValueError, match="train_dataset: expected texts alone for groups, got 'im"):
        fastpo.GroupTrainer(
            tiny.vision_language_model(),
            args=_trainers.config("DPO", tmp_path, {}),
            objective="infonca",
            train_dataset=data,
            processing_class=tiny.processor(),
        )

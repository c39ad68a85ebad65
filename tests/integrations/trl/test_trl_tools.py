"""GRPO in TRL's own tool loop: what a tool answers is read, and not trained."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import trl
from _tiny import one_thread  # noqa: F401

import fastpo

TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
SAMPLED = {"num_generations": 2, "max_completion_length": 400, "num_iterations": 2, "beta": 0.1}
ENTROPIES = {"top_entropy_quantile": 0.3, "entropy_coef": 0.1}
TRUNCATED = {"mask_truncated_completions": True, "max_completion_length": 60}
# Options of the config, of the patch.
CASES = {
    "entropies": (ENTROPIES, {}),
    "truncated": (TRUNCATED, {}),
    "shared": ({"loss_type": "bnpo"}, {"shared_prompts": True}),
}


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one number
        b: the other

    Returns:
        their sum
    """
    return a + b


class Counter:
    """An environment with a tool and a reward of its own."""

    def __init__(self):
        self.total = 0

    def reset(self, **_):
        self.total = 0
        return " it is late"

    def add(self, a: int, b: int) -> int:
        """Adds.

        Args:
            a: one number
            b: the other

        Returns:
            all numbers so far
        """
        self.total += a + b
        return self.total

    def get_reward(self):
        return float(self.total)


def words():
    """A tokenizer whose template TRL knows how to find calls in."""
    own = copy.deepcopy(tiny.tokenizer())
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    own.eos_token = "<|im_end|>"
    own.chat_template = TEMPLATE.read_text()
    return own


def sampler(own):
    """Texts of which some call the tool, a few wrongly: random weights never would."""
    draw = random.Random(3)

    def sample(prompt_ids, *_, **__):
        rows = []
        for _prompt in prompt_ids:
            text, chance = draw.choice(tiny.GOOD), draw.random()
            call = {"name": "add" if chance < 0.5 else "sub", "arguments": {"a": len(text), "b": 2}}
            if chance < 0.6:
                text += f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
            ended = [own.eos_token_id] if draw.random() < 0.8 else []
            rows.append([*own(text)["input_ids"], *ended])
        return rows, None

    return sample


def run(folder, changes, arguments):
    own = words()
    model = tiny.model("qwen3", vocab_size=len(own), max_position_embeddings=2048)
    model.save_pretrained(folder / "model")
    trainer = _trainers.build(
        "GRPO",
        folder,
        str(folder / "model"),
        tiny.prompts(),
        {**SAMPLED, **changes},
        processing_class=own,
        reward_funcs=_trainers.reward,
        **arguments,
    )
    trainer._generate_single_turn = sampler(own)
    logs, parameters = _trainers.train(trainer)
    kept = [{k: v for k, v in log.items() if not k.startswith("fastpo/")} for log in logs]
    return kept, parameters


@pytest.mark.parametrize("given", [{"tools": [add]}, {"environment_factory": Counter}])
@pytest.mark.parametrize("name", CASES)
def test_tools_train_the_same(name, given, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # environments may change
    changes, options = CASES[name]
    calls = tiny.count_calls(monkeypatch)
    own = run(tmp_path, changes, given)
    assert own[0][0]["tools/call_frequency"] > 0
    assert not calls
    with fastpo.patched(**options):
        ours = run(tmp_path, changes, given)
    assert calls
    _trainers.assert_same(ours, own)

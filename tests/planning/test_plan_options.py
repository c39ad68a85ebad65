"""Arguments of `plan_step` that no command line can give, and numbers out of all bounds."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

import fastpo
from fastpo.planning import fits
from fastpo.planning.setting import MOST_TOKENS, Setting

CONFIG = LlamaConfig(
    hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64, vocab_size=99
)
SIZE = "gpu: expected a size as 80GiB or one of .*, got "
OPTIONS = {
    "unknown": ({"contxt": 3}, "options: expected some of attention, batch, .*, got 'contxt'"),
    "memory": ({"memory": 2**30}, "options: expected some of .*, got 'memory'"),
    "gpu": ({"gpu": 80}, SIZE + "80"),
    "gpu of no number": ({"gpu": "9" * 400}, SIZE + "'9999"),
    "gpu of all memory": ({"gpu": "4000000t"}, SIZE + "'4000000t'"),
    "lora": ({"lora": 0.5}, "lora: expected r=16,targets=q_proj"),
    "budget": ({"budget": "1GiB"}, "budget: expected bytes >= 0 or None, got '1GiB'"),
    "trainer": ({"trainer": ["dpo"]}, r"trainer: expected one of dpo, .*, got \['dpo'\]"),
    "shared prompts": (
        {"trainer": ["dpo"], "shared_prompts": "4:1"},
        r"shared_prompts: expected P:C,K with K rows of a prompt for \['dpo'\], got '4:1'",
    ),
    "data": ({"data": 5}, "data: expected a path of a file, got 5"),
    "context": (
        {"context": 2**40},
        f"context: expected at most {MOST_TOKENS} tokens in a step, got 2 ",
    ),
    "batch": (
        {"batch": 2**40},
        f"context: expected at most {MOST_TOKENS} tokens in a step, got {2**41}",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_arguments_of_no_command_line(name):
    given, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        fastpo.plan_step(CONFIG, search=False, **given)


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({}, {"context": 2**20, "batch": 2**12}),
        ({"batch": 64}, {"context": 2**17, "batch": 2**12}),
        ({"context": 64}, {"context": 2**20, "batch": 2**14}),
        ({"context": MOST_TOKENS // 2}, {"context": 2**20, "batch": 1}),
    ],
)
def test_a_search_ends_where_a_step_would_be_refused(given, most):
    setting = Setting("a model", **given)
    assert {what: fits.end_of(setting, what) for what in most} == most

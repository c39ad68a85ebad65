"""The planner's decisions: modes, products, and tiles that no mode changes."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import planner

LLAMA = {"tokens": 4096, "vocab": 128_256, "hidden": 4096}


@pytest.mark.parametrize(
    ("options", "mode", "products"),
    [
        ({"train_hidden": False, "train_head": False}, "score", 1),
        ({"train_head": False}, "frozen", 2),
        ({}, "keep", 3),
        ({"train_hidden": False}, "keep", 2),
        ({"budget": 0}, "lean", 4),
        ({"budget": 2048 * 128_256 * 2}, "lean", 3.5),
    ],
)
def test_modes(options, mode, products):
    plan = fastpo.plan(**LLAMA, **options)
    assert (plan.mode, plan.products) == (mode, products)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 1024, 100_000])
def test_tiles_depend_on_neither_mode_nor_budget(tokens, device):
    shape = LLAMA | {"tokens": tokens, "device": device}
    plans = [
        fastpo.plan(**shape, train_head=head, train_hidden=hidden, budget=budget)
        for head in (True, False)
        for hidden in (True, False)
        for budget in (None, 0, 10**9)
    ]
    assert len({plan.tiles for plan in plans}) == 1


def test_default_budget_keeps_all_tokens_up_to_twice_the_hidden_size():
    assert fastpo.plan(2 * 4096, 128_256, 4096).kept_tokens == 2 * 4096
    assert fastpo.plan(2 * 4096 + 1, 128_256, 4096).kept_tokens == 2 * 4096
    assert fastpo.plan(4096, 128_256, 4096, dtype=torch.float32).mode == "keep"


def test_default_budget_uses_a_large_gpu(monkeypatch):
    monkeypatch.setattr(planner, "memory_of", lambda device: 80 * 2**30 * (device.type == "cuda"))
    shape = {"tokens": 8192, "vocab": 151_936, "hidden": 896}
    assert fastpo.plan(**shape).mode == "lean"
    assert fastpo.plan(**shape, device="cuda").mode == "keep"
    assert planner.default_budget(128_256, 4096, torch.device("cuda")) == 5 * 2**30


@pytest.mark.parametrize("vocab", [1, 255, 32_768, 32_769, 50_257, 128_256, 151_936])
def test_blocks_of_exponentials_are_alike_and_aligned(vocab):
    words = planner.exponential_words(vocab)
    blocks = -(-vocab // words)
    assert words % planner.GRANULE == 0 and words <= 32_768
    assert vocab <= blocks * words < vocab + blocks * planner.GRANULE


@pytest.mark.parametrize("memory", [0, 24 * 2**30, 80 * 2**30])
@pytest.mark.parametrize("tokens", [0, 1, 300, 8192])
def test_rows_of_a_frozen_head(monkeypatch, tokens, memory):
    monkeypatch.setattr(planner, "memory_of", lambda _: memory)
    rows = planner.frozen_rows(tokens, 128_256, 2, torch.device("cuda"))
    assert rows % 128 == 0 < rows
    assert rows * 128_256 * 2 <= max(256 * 2**20, memory // 64)
    assert planner.recomputed_words(tokens, 32_256) * tokens <= 2**27


@pytest.mark.parametrize("head", [True, False])
def test_the_plan_of_an_anchored_head(head):
    shape = {"tokens": 8192, "vocab": 50_257, "hidden": 4096, "device": "cuda", "train_head": head}
    classic, plan = fastpo.plan(**shape), fastpo.plan(**shape, backend="anchored")
    assert (plan.mode, plan.products) == (classic.mode, classic.products)
    assert plan.row_words == 50_688 and plan.block_words == 25_344
    assert plan.kept_bytes == (8192 * 50_688 * 2 if head else 0)
    assert plan.workspace_bytes < classic.workspace_bytes  # no float32 logits
    assert fastpo.plan(**shape, backend="anchored", dtype=torch.float16).row_words == 50_272


def test_kept_bytes_stay_within_the_budget():
    plan = fastpo.plan(**LLAMA, budget=10**9)
    assert 0 < plan.kept_bytes <= 10**9


def test_table_is_readable():
    text = str(fastpo.plan(**LLAMA))
    assert "keep" in text and "4096 of 4096" in text and "3.00" in text

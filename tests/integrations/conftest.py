"""Logits of the tiny models are more than a block, so that nothing is computed at once."""

import pytest

import fastpo
from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.seams.saying import say_once


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1, "cuda": 1})


@pytest.fixture
def afresh(monkeypatch):
    """Nothing was said before; nothing stays patched."""
    monkeypatch.setattr(cell, "told", set())
    say_once.cache_clear()
    yield
    fastpo.unpatch()

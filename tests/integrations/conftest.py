"""Logits of the tiny models are more than a block, so that nothing is computed at once."""

import pytest

from fastpo.integrations.lazy import blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1, "cuda": 1})

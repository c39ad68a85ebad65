"""Packed rows at the extremes: no memory of tokens squared, masks once, nothing kept behind."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from _batches import model_of
from _tiny import Widest, one_thread  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from fastpo.integrations.sharing import attention
from fastpo.integrations.sharing.backbone import layer_cost, shared_prompts
from fastpo.layout.tree import layout_of


@pytest.fixture(autouse=True)
def registries():
    yield
    attention.restore()


def through(model, ids, mask):
    """Forward and backward of the backbone; how many numbers it returned."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    (hidden * mask.unsqueeze(-1)).sum().backward()
    model.zero_grad()
    return hidden.numel()


def beginning_alike(lengths, common, last=0):
    """Rows of these lengths; `last`: the first word of what follows in the first row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=generator)
    ids[:, :common] = ids[0, :common]
    ids[0, common] = last
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return ids * mask, mask


@pytest.mark.parametrize("last", [2, 301])
def test_a_row_of_8000_tokens_beside_seven_of_100(last):
    """Nothing is larger than the hidden states it was asked for, wherever the long row sorts."""
    model = model_of("llama", "sdpa", max_position_embeddings=8192)()
    ids, mask = beginning_alike([8000] + [100] * 7, 60, last)
    with shared_prompts(model) as handle:
        model(input_ids=ids[:, :90], attention_mask=mask[:, :90])  # the probe
        with Widest() as widest:
            hidden = through(model, ids, mask)
        assert handle.tokens.saved > 0.8
    assert widest.elements <= hidden


class Memory(Widest):
    """The largest number of elements any tensor has in memory: of masks, the views do not count."""

    def counts(self, x):
        self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return False


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_no_memory_of_tokens_squared(name):
    """Of the rows, and of layers with a window, whose first row has a mask, too."""
    model = model_of(name, "sdpa", max_position_embeddings=4096)()
    ids, mask = beginning_alike([4000, 3900], 2000)
    with shared_prompts(model) as handle:
        model(input_ids=ids[:, :90], attention_mask=mask[:, :90])  # the probe
        with Memory() as memory:
            hidden = through(model, ids, mask)
        assert handle.tokens.saved > 0.25
    assert memory.elements <= 2 * hidden


def test_64_completions_of_a_prompt_have_two_masks(monkeypatch):
    """That of the longest row, if any, and one whose parts all others take in all layers."""
    asked, ask = [], attention._Mask._ask

    def noted(self, kwargs, shared, owned, **changes):
        asked.append((shared, owned))
        return ask(self, kwargs, shared, owned, **changes)

    model = model_of("llama", "eager")()
    ids, mask = beginning_alike([128 - i for i in range(64)], 60)
    ids[:, 60] = torch.arange(100, 164)
    with shared_prompts(model) as handle:
        model(input_ids=ids[:2], attention_mask=mask[:2])  # the probe
        monkeypatch.setattr(attention._Mask, "_ask", noted)
        through(model, ids, mask)
        assert handle.tokens.saved > 0.5
    assert sorted(asked) == [(0, 128), (60, 67)]


@pytest.mark.parametrize("always", [False, True])
def test_little_in_common_of_long_rows_is_not_shared(always):
    """Masks of 400 tokens squared would cost more than 16 tokens of layers this small."""
    model = model_of("llama", "sdpa", max_position_embeddings=512)()
    ids, mask = beginning_alike([400, 300, 350, 320], 16)
    with shared_prompts(model, always=always) as handle:
        model(input_ids=ids, attention_mask=mask)
    assert handle.tokens.computed == mask.sum() - (3 * 16 if always else 0)


def test_tokens_and_pairs_cost_what_is_counted():
    """By torch, in the products of a padded batch."""
    model, (ids, mask) = model_of("llama", "eager")().model, beginning_alike([60, 90], 40)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask)
    expected = layer_cost(model).padded(layout_of(ids, mask))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_no_cache_is_left_behind():
    """Of a packed row, in which nothing could go on."""
    model, (ids, mask) = model_of("llama", "sdpa")().model, beginning_alike([60, 90], 40)
    given = {"input_ids": ids, "attention_mask": mask}
    assert model.config.use_cache and model(**given).past_key_values is not None
    with shared_prompts(model) as handle:
        assert model(**given).past_key_values is None and handle.tokens.saved > 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_300_batches():
    model = model_of("llama", "sdpa")()
    generator = torch.Generator().manual_seed(1)
    seen = []
    with shared_prompts(model, always=True):
        for _ in range(300):
            rows, common = torch.randint(2, 9, (2,), generator=generator).tolist()
            lengths = torch.randint(common + 1, 100, (rows,), generator=generator).tolist()
            through(model, *beginning_alike(lengths, common))
            gc.collect(0)
            status = Path("/proc/self/status").read_text()
            seen.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]))
    # What grows with every batch is above all that was seen early on; a test before this one may
    # still give memory back in between.
    assert min(seen[-20:]) - max(seen[100:120]) < 2048  # kB; seen: 660

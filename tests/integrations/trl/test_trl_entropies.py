"""Tokens of one context are on one side of GRPO's entropy threshold, whatever word follows."""

from types import SimpleNamespace

import pytest
import torch

import fastpo
from fastpo.objectives import get

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")


@pytest.fixture(scope="module")
def entropies():
    """[2, 32] nats: rows of one context and its 32 followers, then of 32 others."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=g)
    hidden[:32] = hidden[0]
    weight = torch.randn(1000, 16, generator=g)
    labels = torch.arange(0, 960, 15)
    return fastpo.linear_logps(hidden, weight, labels, outputs=("entropy",)).entropy.view(2, 32)


def high(entropies, mask, threshold):
    """As a patched trainer of one process asks for it."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x
        )
    )
    with fastpo.patched():
        return grpo_trainer.GRPOTrainer.get_high_entropy_mask(trainer, entropies, mask, threshold)


def test_one_context_is_chosen_as_one(entropies):
    """Its entropies differ in their last bits, or this would ask nothing."""
    assert len(entropies[0].unique()) > 1
    mask = torch.ones(2, 32)
    below = (entropies[1] < entropies[0, 0]).sum().item()
    for threshold in ((below + k) / 63 for k in range(32)):
        found = high(entropies, mask, threshold)
        assert found[0].all()
        assert torch.equal(found[1], entropies[1] > entropies[0, 0])
        ours = get("high_entropy_mask", top=1 - threshold)
        assert torch.equal(ours(entropy=entropies, mask=mask.bool())["is_weights"], found.float())


def test_whoever_is_masked_is_not_chosen(entropies):
    mask = torch.ones(2, 32)
    mask[0, ::2] = 0
    assert torch.equal(high(entropies, mask, 0.0), mask.bool())
    assert not high(entropies, torch.zeros(2, 32), 0.5).any()
    assert high(entropies[:, :0], mask[:, :0], 0.5).shape == (2, 0)


def test_a_thousandth_of_a_nat_is_a_difference():
    entropies = torch.tensor([[1.0, 2.0, 2.001, 3.0]])
    assert high(entropies, torch.ones(1, 4), 2 / 3).tolist() == [[False, False, True, True]]

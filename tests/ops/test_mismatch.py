"""What `fastpo.diagnose` says of two engines' log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

import fastpo


def test_the_same_log_probabilities_have_a_ratio_of_1():
    x = -torch.rand(3, 5)
    found = fastpo.diagnose(x, x)
    assert found == (15, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, None)


def test_its_numbers_are_those_of_the_ratio():
    g = torch.Generator().manual_seed(0)
    sampler, gap = -torch.rand(1000, generator=g), 0.1 * torch.randn(1000, generator=g)
    found = fastpo.diagnose(sampler, sampler + gap)
    ratio, gap = (sampler + gap - sampler).double().exp(), (sampler + gap - sampler).double()
    assert found.tokens == 1000
    assert found.mean == pytest.approx(ratio.mean().item(), rel=1e-12)
    assert found.outside == ((ratio < 0.9) | (ratio > 1.1)).double().mean().item()
    expected = torch.quantile(gap, torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)).tolist()
    assert [found.q01, found.median, found.q99] == pytest.approx(expected, abs=1e-12)
    assert found.largest == gap.abs().max().item()


def test_words_left_out_by_the_sampler_are_mass_that_is_missing():
    """Scored over all words the mean ratio is the mass; over the words that were kept it is 1."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 16), torch.randn(50, 16)
    z = hidden @ weight.t()
    kept = z.topk(5).indices
    over_kept = z.gather(1, kept).log_softmax(1)
    drawn = torch.multinomial(over_kept.exp(), 1)
    sampler, labels = over_kept.gather(1, drawn)[:, 0], kept.gather(1, drawn)[:, 0]
    whole = fastpo.linear_logps(hidden, weight, labels).logps
    replayed = fastpo.linear_logps(hidden, weight, labels, support=kept).logps
    mass = z.softmax(1).gather(1, kept).sum(1).mean().item()
    plain = fastpo.diagnose(sampler, whole)
    assert plain.mean == pytest.approx(mass, rel=1e-5)
    found = fastpo.diagnose(sampler, replayed, whole_logps=whole)
    assert found.largest < 1e-5 and found.outside == 0
    assert found.kept_mass == pytest.approx(mass, rel=1e-5)


def test_tokens_that_do_not_count_are_left_out():
    sampler = torch.tensor([-1.0, -2.0, math.nan, -3.0])
    logps = torch.tensor([-1.0, -2.5, -1.0, 9.0])
    found = fastpo.diagnose(sampler, logps, mask=torch.tensor([1, 1, 1, 0]))
    assert (found.tokens, found.largest, found.outside) == (2, 0.5, 0.5)
    one = fastpo.diagnose(sampler, logps, mask=torch.tensor([0, 1, 1, 0]), whole_logps=2 * logps)
    assert one.kept_mass == math.exp(-2.5)
    assert (one.tokens, one.q01, one.median, one.q99) == (1, -0.5, -0.5, -0.5)
    # But not what the trainer does not know.
    unknown = fastpo.diagnose(logps, sampler)
    assert math.isnan(unknown.mean) and unknown.outside == 0.75
    names = {"mean", "outside", "q01", "median", "q99", "largest"}
    assert set(found.log("s/")) == {f"s/{name}" for name in names}


def test_an_impossible_token_leaves_quantiles():
    """A line to -inf has no numbers: a quantile beside it is the nearer rank."""
    sampler = torch.full((3,), -1.0)
    found = fastpo.diagnose(sampler, torch.tensor([-1.0, -math.inf, -1.0]))
    assert (found.q01, found.median, found.q99) == (-math.inf, 0.0, 0.0)
    found = fastpo.diagnose(sampler, torch.tensor([-1.0, -math.inf, -math.inf]))
    assert (found.q01, found.median, found.q99) == (-math.inf, -math.inf, 0.0)
    impossible = torch.tensor([-1.0, -math.inf, -1.0])
    found = fastpo.diagnose(impossible, sampler)
    assert (found.q01, found.median, found.q99) == (0.0, 0.0, math.inf)


def test_what_cannot_be_compared_is_said():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"logps: expected shape \(2, 3\), got \(3,\)"):
        fastpo.diagnose(x, x[0])
    for given in ((x, [0.0]), ([0.0], x), (x, None)):
        with pytest.raises(ValueError, match="logps: expected a tensor, got "):
            fastpo.diagnose(*given)
    with pytest.raises(ValueError, match="mask: expected a tensor, got list"):
        fastpo.diagnose(x, x, mask=[True])
    with pytest.raises(ValueError, match="mask: expected sampled tokens, got none"):
        fastpo.diagnose(x, x, mask=x)

"""`multi_token_logps`: every depth as if it were alone, in one walk, judged against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _draws import assert_draws
from _probes import count_calls
from _tile_sources import SOURCES
from test_linear_logps import BACKENDS, DIFFERENTIABLE, weights
from torch import Tensor

import fastpo
from fastpo import reference
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import make_head

CLASSIC = [name for name in BACKENDS if name not in ("anchored", "cutlass")]
B, T, V, H = 2, 7, 501, 24


def make(depths: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Hidden states of all depths, weight and bias; labels, some ignored."""
    heads = [make_head(B * T, V, H, bias=True, seed=10 * seed + d) for d in range(depths)]
    labels = heads[0].labels.view(B, T).clone()
    labels[0, 3] = labels[1, 0] = -100
    assert heads[0].bias is not None
    hidden = torch.stack([x.hidden.view(B, T, H) for x in heads])
    return [hidden, heads[0].weight, heads[0].bias], labels


def run(function: Any, tensors: list[Tensor], dtype: torch.dtype, labels: Tensor, **options: Any):
    hidden, weight, bias = leaves = [x.to(dtype).clone().requires_grad_() for x in tensors]
    stats = function(hidden.unbind(), weight, labels, bias=bias, **options)
    grads = torch.autograd.grad(weights(stats, DIFFERENTIABLE), leaves)
    return stats._asdict() | dict(zip(("dhidden", "dweight", "dbias"), grads, strict=True))


@pytest.mark.parametrize(
    ("backend", "depths", "budget"),
    [*((name, 3, None) for name in CLASSIC), (None, 1, 0), (None, T + 2, 0)],
)
def test_matches_float64(backend, depths, budget):
    results = []
    options = {"temperature": 0.8, "softcap": 20.0}
    for seed in range(2):
        tensors, labels = make(depths, seed=seed)
        given = {"outputs": OUTPUTS, "backend": backend, "budget": budget, **options}
        fused = run(fastpo.multi_token_logps, tensors, torch.float32, labels, **given)
        slow = (reference.multi_token_logps, tensors)
        eager = run(*slow, torch.float32, labels, **options)
        results.append((fused, eager, run(*slow, torch.float64, labels, **options)))
    assert_draws(results)


def test_each_depth_is_linear_logps_of_later_labels(monkeypatch):
    (hidden, weight, bias), labels = make(3)
    alone = []
    for d in range(3):
        later = torch.full_like(labels, -100)
        later[:, : T - d] = labels[:, d:]
        alone.append(fastpo.linear_logps(hidden[d], weight, later, bias=bias, outputs=OUTPUTS))
    calls = count_calls(monkeypatch)
    found = fastpo.multi_token_logps(hidden, weight, labels, bias=bias, outputs=OUTPUTS)
    assert len(calls) == 1
    for name in OUTPUTS:
        assert torch.equal(getattr(found, name), torch.stack([getattr(x, name) for x in alone]))


def test_labels_of_each_depth_and_another_number_for_none():
    (hidden, weight, _), labels = make(2)
    own = torch.stack([labels, labels.flip(1)])
    own = own.masked_fill(own < 0, 7)
    found = fastpo.multi_token_logps(hidden, weight, own, ignore_index=7).logps
    alone = fastpo.linear_logps(hidden[1], weight, own[1], ignore_index=7).logps
    assert torch.equal(found[1], alone) and not found[own == 7].any()
    shifted = fastpo.multi_token_logps(hidden, weight, own[0], ignore_index=7).logps
    assert not shifted[1, :, -1].any() and shifted[1, :, :-1].any()


@pytest.mark.parametrize("detach", [True, [False, True, False], False])
def test_detached_depths_train_the_head_alone(detach):
    (hidden, weight, _), labels = make(3)
    depths = [x.clone().requires_grad_() for x in hidden]
    weight.requires_grad_()
    fastpo.multi_token_logps(depths, weight, labels, detach=detach).logps.sum().backward()
    cut = [detach] * 3 if isinstance(detach, bool) else detach
    assert [x.grad is None for x in depths] == cut
    together = weight.grad.clone()
    weight.grad = None
    fastpo.multi_token_logps(depths, weight, labels).logps.sum().backward()
    torch.testing.assert_close(together, weight.grad)


def test_a_quantised_head():
    source, weight = SOURCES["nvfp4"](torch.float32)
    hidden, labels = torch.randn(2, 3, 48), torch.tensor([5, 2050, 7])
    found, dense = (fastpo.multi_token_logps(hidden, w, labels).logps for w in (source, weight))
    assert torch.equal(found, dense)


WRONG: dict[str, dict[str, Any]] = {
    "hidden_per_depth: expected at least one depth, got none": {"hidden_per_depth": []},
    "hidden_per_depth: expected tensors, got 3": {"hidden_per_depth": 3},
    r"hidden_per_depth\[1\]: expected a tensor, got 3": {
        "hidden_per_depth": [torch.ones(2, 7, 24), 3]
    },
    r"hidden_per_depth\[0\]: expected shape \(\.\.\., T, H\), got \(24,\)": {
        "hidden_per_depth": [torch.ones(24)]
    },
    r"hidden_per_depth\[1\]: expected torch.float32 of shape \(2, 7, 24\) on cpu as depth 0, "
    r"got torch.float32 of \(2, 6, 24\) on cpu": {
        "hidden_per_depth": [torch.ones(2, 7, 24), torch.ones(2, 6, 24)]
    },
    r"hidden_per_depth\[1\]: expected torch.float32 of .* as depth 0, got torch.bfloat16": {
        "hidden_per_depth": [torch.ones(2, 7, 24), torch.ones(2, 7, 24).bfloat16()]
    },
    r"labels: expected shape \(2, 7\) or \(3, 2, 7\), got \(2, 6\)": {"labels": torch.ones(2, 6)},
    "labels: expected dtype torch.int64, got torch.uint8": {
        "labels": torch.ones(2, 7, dtype=torch.uint8)
    },
    r"detach: expected True, False or 3 of them, got \[True\]": {"detach": [True]},
    "detach: expected True, False or 3 of them, got 1": {"detach": 1},
    "ignore_index: expected an integer, got None": {"ignore_index": None},
}


@pytest.mark.parametrize("match", WRONG)
def test_errors(match):
    (hidden, weight, _), labels = make(3)
    given = {"hidden_per_depth": list(hidden), "weight": weight, "labels": labels, **WRONG[match]}
    with pytest.raises(ValueError, match=match):
        fastpo.multi_token_logps(**given)

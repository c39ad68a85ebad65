"""float16 and losses that are scaled, so that small gradients survive in it."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import reference
from fastpo.testing import assert_as_good_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("mode", ["frozen", "keep"])
def test_a_scaled_loss_reaches_certain_tokens_in_float16(mode):
    """Their gradient is lost in float16 until the scale of the loss has lifted it."""
    N, V, H, scale = 32, 500, 256, 65536.0
    weight = (0.02 * torch.randn(V, H, generator=torch.Generator().manual_seed(0))).half()
    labels = torch.arange(N)
    hidden = (weight[labels].float() * (19 / (H * 0.02**2))).half()
    grads = []
    for dtype in (None, torch.float32, torch.float64):
        x, w = (t.to(dtype or t.dtype).to(DEVICE) for t in (hidden, weight))
        x.requires_grad_(), w.requires_grad_(mode == "keep")
        module = fastpo if dtype is None else reference
        logps = module.linear_logps(x, w, labels.to(DEVICE)).logps
        grads.append(torch.autograd.grad(logps.sum() * (scale / N), x)[0])
    fused, eager, truth = grads
    assert (truth / scale).abs().median() < 2.0**-24
    assert_as_good_as_eager("d hidden", fused, eager.half(), truth)
    small = truth.abs() < 1e-3
    error = (fused.double() - truth)[small].norm() / truth[small].norm()
    assert small.any() and error < 2.0**-9

"""A vocabulary may be odd: the rows that a library multiplies start at multiples of 32 cells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import planner

N, V, H = 40, 333, 32


@pytest.fixture
def strides(monkeypatch: pytest.MonkeyPatch, library_products: None) -> list[int]:
    """From row to row, of every matrix that goes into a product, or comes from one."""
    found: list[int] = []

    def seen(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
            found.extend(max(x.stride()) for x in (*args, *kwargs.values()))
            return product(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "mm", seen(torch.mm))
    monkeypatch.setattr(Tensor, "addmm_", seen(Tensor.addmm_))
    return found


def _logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastpo.linear_logps(hidden, weight, labels, backend="torch").logps


def _lean(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastpo.linear_logps(hidden, weight, labels, backend="torch", budget=0).logps


def _divergence(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    teacher = weight.detach().roll(1, 0)
    return fastpo.linear_divergence(
        hidden, weight, hidden.detach(), teacher, mask=labels >= 0, kind="jsd", backend="torch"
    ).divergence


def _mixed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    hiddens, weights = (hidden, hidden.detach()), (weight, weight.detach().roll(1, 0))
    return fastpo.mixed_linear_logps(hiddens, weights, (0.7, 0.3), labels, backend="torch").logps


@pytest.mark.parametrize("loss", [_logps, _lean, _divergence, _mixed])
@pytest.mark.parametrize("trained", [True, False])
def test_rows_of_products_are_aligned(
    monkeypatch: pytest.MonkeyPatch,
    strides: list[int],
    loss: Callable[..., Tensor],
    trained: bool,
) -> None:
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(16, 64))
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=trained)
    labels = torch.randint(0, V, (N,))
    loss(hidden, weight, labels).sum().backward()
    blocks = -(-N // 16) * -(-V // 64)
    assert len(strides) >= 2 * blocks * (2 + trained)
    assert not [stride for stride in strides if stride % 32]

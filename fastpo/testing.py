"""The comparison rule shared by tests and benchmarks: judged against float64, measured by eager.

A fused result may be at most twice as far from the truth as plain PyTorch of the same dtype, plus
half a unit in the last place of its largest value. There are no tolerances per dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite if either is NaN where the other is not.

    Found on the device of `truth`: a CPU takes seconds for d weight of an 8B model's head.
    """
    truth = truth.detach().double()
    value = value.detach().double().to(truth.device)
    if value.shape != truth.shape:
        raise ValueError(f"value: expected shape {tuple(truth.shape)}, got {tuple(value.shape)}")
    if not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    same = value == truth  # equal infinities have no difference
    gap = (value - truth).abs().masked_fill(same | truth.isnan(), 0.0)
    return gap.max().item() if gap.numel() else 0.0


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest finite value."""
    size = truth.detach().double().abs()
    largest = size.masked_fill(~size.isfinite(), 0.0).max().item() if size.numel() else 0.0
    return largest * torch.finfo(dtype).eps / 2


def assert_as_good_as_eager(
    name: str,
    fused: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    slack: float = 0.0,
) -> None:
    """Raises AssertionError with the three errors when `fused` breaks the rule.

    Where eager has no finite number and the truth has, `fused` may give the same, or at most four
    times the error allowed elsewhere: the numbers there are harder.

    slack: of results that are differences of larger numbers, half a unit of those.
    """
    slack += rounding(truth, fused.dtype)
    error, known = max_error(fused, truth), max_error(eager, truth)
    if not math.isfinite(known):
        error, known = _errors_beside(*(x.detach().to(truth.device) for x in (fused, eager, truth)))
    if not error <= factor * known + slack:
        raise AssertionError(
            f"{name}: error {error:.3e} against float64, "
            f"eager has {known:.3e}, half an ulp is {slack:.3e}"
        )


def _errors_beside(fused: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float]:
    """Of both where eager is finite or like the truth; of fused elsewhere a quarter of it."""
    lost = ~((eager.double() - truth).isfinite() | _alike(eager, truth))
    there = lost & ~_alike(fused, eager)
    error = max(max_error(fused[~lost], truth[~lost]), max_error(fused[there], truth[there]) / 4)
    return error, max_error(eager[~lost], truth[~lost])


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


@dataclass(frozen=True)
class HeadInputs:
    """One head problem; `like` gives leaf copies in another dtype."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    bias: Tensor | None = None  # [V]

    def like(self, dtype: torch.dtype, *, grad: bool = True) -> HeadInputs:
        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(dtype).clone().requires_grad_(grad)

        hidden, weight = leaf(self.hidden), leaf(self.weight)
        assert hidden is not None and weight is not None
        return HeadInputs(hidden, weight, self.labels, leaf(self.bias))

    def leaves(self) -> dict[str, Tensor]:
        named = {"dhidden": self.hidden, "dweight": self.weight, "dbias": self.bias}
        return {name: x for name, x in named.items() if x is not None and x.requires_grad}


def make_head(
    tokens: int,
    vocab: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    peak: float = 6.0,
    ignored: float = 0.0,
    seed: int = 0,
) -> HeadInputs:
    """A head as a trained model has it: Zipf-like word frequencies, rows peaked at the label.

    peak: how many nats the label's logit is raised by on average; 0 gives flat random logits.
    ignored: share of the rows whose label is -100.
    """
    # Where it is used: a CPU draws for 6 s at the head of an 8B model.
    g = torch.Generator(device).manual_seed(seed)
    draw: dict[str, Any] = {"generator": g, "dtype": torch.float32, "device": device}
    weight = torch.randn(vocab, hidden, **draw) / hidden**0.5
    frequency = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64, device=device)
    labels = torch.multinomial(frequency, max(tokens, 1), replacement=True, generator=g)[:tokens]
    h = torch.randn(tokens, hidden, **draw) * 2
    strength = peak * torch.rand(tokens, 1, **draw) * 2
    h = h + strength * weight[labels]  # <W_y, W_y> is about 1
    if ignored:
        labels = labels.masked_fill(torch.rand(tokens, **draw) < ignored, -100)
    offset = torch.randn(vocab, **draw).to(dtype) if bias else None
    return HeadInputs(h.to(dtype), weight.to(dtype), labels, offset)

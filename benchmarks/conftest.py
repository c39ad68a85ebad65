"""What the cases of pytest-benchmark share: `make bench` runs them.

On a GPU their clock is the device's. A moment is two events: where the work before it ends, and,
behind a head start for the host, where the work after it begins.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The formulas that the objectives are compared with.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "objectives"))


class Moment:
    """`later - earlier` is the seconds of what was queued between them."""

    def __init__(self) -> None:
        self.ends, self.begins = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.ends.record()
        self.ends.synchronize()
        # What Python takes before the first kernel is not the device's time: machine.stopwatch.
        torch.cuda._sleep(10_000_000)
        self.begins.record()

    def __sub__(self, earlier: Moment) -> float:
        return earlier.begins.elapsed_time(self.ends) / 1e3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="sizes that only show that all runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            own = item.get_closest_marker("benchmark")
            # pytest-benchmark reads one mark, the first.
            options = {} if own is None else own.kwargs
            item.add_marker(pytest.mark.benchmark(**options, timer=Moment), append=False)

"""`fastpo bench sweep`: how wide the tiles of the Triton row kernels should be, and how many warps.

Each candidate stands in for `kernels/_blocks.py` while it runs; the other backends run beside it.
GB/s count what a kernel must read and write once; a second read of the tile comes from cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpo.ops.rows import backend as R
from fastpo.ops.rows import registry
from fastpo.testing import max_error, rounding

from . import machine

CAPS = (1024, 2048, 4096, 8192, 16_384)
WARPS = (4, 8, 16)
# kernel -> bytes per cell that must move
KERNELS = {"score": 4, "score, all statistics": 4, "forward, kept": 6, "backward, kept": 4}
_ALL = sum(R.STATS.values())


@dataclass
class Tile:
    raw: Tensor  # [n, v] float32
    kept: Tensor  # [n, v] bfloat16
    labels: Tensor  # [n]
    state: Tensor  # [STATE, n]
    anchors: Tensor  # [n]
    grads: Tensor  # [GRADS, n]

    @classmethod
    def make(cls, n: int, width: int, device: str) -> Tile:
        g = torch.Generator(device).manual_seed(0)
        raw = torch.randn(n, width, generator=g, device=device) * 3
        labels = torch.randint(width, (n,), generator=g, device=device)
        kept = torch.empty(n, width, device=device, dtype=torch.bfloat16)
        state = torch.empty(R.STATE, n, device=device)
        grads = torch.full((R.GRADS, n), 0.1, device=device)
        return cls(raw, kept, labels, state, torch.empty(n, device=device), grads)

    def launch(self, backend: Any, kernel: str) -> None:
        plain = R.LogitMap()
        if kernel == "backward, kept":
            # In place the values shrink from run to run; the time does not.
            backend.backward(
                self.kept, self.anchors, 0, self.labels, None, self.grads, plain, False, self.kept
            )
            return
        keep = kernel == "forward, kept"
        stats = _ALL if "all" in kernel else 0
        extra = (self.kept, self.anchors) if keep else (None, None)
        backend.forward(self.raw, 0, self.labels, None, self.state, plain, stats, *extra, False)

    def reset(self) -> None:
        for row, value in zip(self.state, R.INITIAL_STATE, strict=True):
            row.fill_(value)


def bench(
    device: str,
    *,
    rows: int,
    width: int,
    repeats: int,
    time_limit: float | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """The report; handed to `keep` after each kernel. No kernel is begun after the time limit."""
    began = time.monotonic()
    tile = Tile.make(rows, width, device)
    report = machine.facts(device) | {"what": "sweep", "n": rows, "width": width}
    report |= {"repeats": repeats, "rows": [], "left_out": []}
    for kernel, cell_bytes in KERNELS.items():
        if time_limit is not None and time.monotonic() - began > time_limit:
            report["left_out"].append({"kernel": kernel, "reason": "time limit"})
            continue
        found = [_Candidate(*each) for each in _candidates(torch.device(device), width)]
        for candidate in found:
            _first_run(candidate, tile, kernel)
        watch = machine.stopwatch(device)
        for _ in range(repeats):
            for candidate in found:
                if candidate.reason is None:
                    candidate.runs.append(candidate.timed(watch, tile, kernel))
        report["rows"] += [c.row(kernel, cell_bytes * rows * width) for c in found]
        keep(report)
    return report


class _Candidate:
    def __init__(self, name: str, backend: str, blocks: Any, reason: str | None) -> None:
        self.name, self.backend, self.blocks = name, backend, blocks
        self.reason, self.status = reason, "ok" if reason is None else "refused"
        self.runs: list[float] = []

    def timed(self, watch: machine.Stopwatch, tile: Tile, kernel: str) -> float:
        tile.reset()
        with _standing_in(self.blocks):
            return watch(partial(tile.launch, registry.kernels(self.backend), kernel))[0].ms

    def row(self, kernel: str, moved: int) -> dict[str, Any]:
        row: dict[str, Any] = {"kernel": kernel, "variant": self.name, "status": self.status}
        if self.reason is not None:
            return row | {"reason": self.reason}
        median = statistics.median(self.runs)
        return row | {"median_ms": median, "runs_ms": self.runs, "gb_per_s": moved / median / 1e6}


def _candidates(device: torch.device, width: int) -> Iterator[tuple[str, str, Any, str | None]]:
    """Name, backend, tiles, and why it cannot run."""
    for backend in ("torch", "cuda", "cpu"):
        yield backend, backend, None, registry.kernels(backend).unavailable(device)
    reason = registry.kernels("triton").unavailable(device)
    if reason is not None:
        yield "triton", "triton", None, reason
        return
    from ..kernels._blocks import Blocks

    yield "triton, as shipped", "triton", None, None
    widest = max(32, 1 << (width - 1).bit_length())
    for cap in sorted({min(cap, widest) for cap in CAPS}):
        for warps in WARPS:
            yield f"triton {cap} / {warps}", "triton", Blocks(cap, warps), None


@contextmanager
def _standing_in(blocks: Any | None) -> Iterator[None]:
    """The kernels ask for their tiles by this name, and get these whatever the width."""
    if blocks is None:
        yield
        return
    from ..kernels import rows

    original = rows.row_blocks
    rows.row_blocks = lambda _: blocks
    try:
        yield
    finally:
        rows.row_blocks = original


def _first_run(candidate: _Candidate, tile: Tile, kernel: str) -> None:
    """Compiles, and compares the log-sum-exp with float64."""
    if candidate.reason is not None:
        return
    try:
        candidate.timed(machine.stopwatch(tile.raw.device.type), tile, kernel)
    except Exception as error:  # of Triton's compiler: a tile it cannot hold, for one
        line = (str(error).splitlines() or ["no reason given"])[0]
        candidate.status, candidate.reason = "refused", f"{type(error).__name__}: {line[:160]}"
        return
    if kernel != "backward, kept":
        top, others, target = tile.state[: R.TARGET + 1].double()
        lse = top + (others + (target - top).exp()).log()
        truth = torch.cat([part.double().logsumexp(1) for part in tile.raw.split(1024)])
        off = max_error(lse, truth)
        allowed = 2 * max_error(tile.raw.logsumexp(1), truth) + rounding(truth, torch.float32)
        if not off <= allowed:
            candidate.status = "wrong"
            candidate.reason = f"log-sum-exp: error {off:.2e}, allowed {allowed:.2e}"

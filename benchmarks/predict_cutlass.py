"""Of benchmarks/predict.py: what is assumed of an H100, and how long a product on CUTLASS takes.

Counted in machine code: the tensor cores' clocks of a step of the main loop, and what a thread
executes for a block's exponentials.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastpo.ops.rows import anchored_cutlass as cutlass

ROOT = Path(__file__).parents[1]
NVCC = ROOT / "build" / "nvcc"  # where `make cuda` puts it

SCHEDULES = {
    "cutlass": cutlass.schedule(),
    "cooperative": cutlass.schedule()._replace(pingpong=False),
}

ASSUMED = {
    "multiprocessors": 132,
    "GHz": 1.6,
    "bfloat16 FLOP a clock of one": 4096,
    "of it attained by a library": 0.91,
    "of that by a main loop of ours": 0.95,
    "instructions of a warp a clock of one": 4,
    "clocks from one instruction of a warp to its next": 2,
    "exponentials a clock of one": 16,
    "TB/s": 3.35,
    "of it attained": 0.9,
    "µs between launches": 2.0,
    "of the rows with a new maximum in a tile": 0.2,  # Σ 1/k over 16 tiles in no order, over 16
}
CLOCKS = ASSUMED["multiprocessors"] * ASSUMED["GHz"] * 1e6  # a millisecond, of all
FLOPS = CLOCKS * ASSUMED["bfloat16 FLOP a clock of one"] * ASSUMED["of it attained by a library"]


@cache
def tools() -> tuple[Any, Any, Any, Any]:
    """The GPU that tests pretend, how they compile and read machine code.

    For this process they replace the real.
    """
    tests = ROOT / "tests"
    sys.path[:0] = [str(tests), str(tests / "kernels")]
    os.environ.setdefault("CUDACXX", str(NVCC / "nvidia" / "cu13" / "bin" / "nvcc"))
    os.environ.setdefault("FASTPO_CUTLASS", str(NVCC / "cutlass_library" / "source" / "include"))
    import _aot
    import _nvcc
    import _pretended_gpu
    import _sass

    return _pretended_gpu, _aot, _nvcc, _sass


@dataclass(frozen=True)
class Fused:
    """A product on CUTLASS, as csrc/cuda/anchored.cu takes it."""

    n: int
    v: int
    h: int
    sums: int
    stored: bool
    words: int  # of a block
    swizzle: int
    overlaps: bool  # one warp group multiplies while the other takes exponentials

    @property
    def file(self) -> str:
        schedule = "pingpong" if self.words == cutlass.block_words(True) else "cooperative"
        return f"anchored_{schedule}" + "_stats" * (self.sums > 1)

    @property
    def blocks(self) -> int:
        """Those beyond the end among them."""
        return math.prod(cutlass.padded_blocks(self.n, self.v, self.words, self.swizzle))

    @property
    def cells(self) -> int:
        return self.blocks * 128 * self.words

    @property
    def warps(self) -> int:
        """That share a block's epilogue."""
        return 4 if self.overlaps else 8

    @property
    def compiled(self) -> tuple[str, dict[str, int]]:
        """Machine code for sm_90a, and what it takes."""
        by_storing, taken = _compiled(self.file)
        return by_storing[self.stored], taken

    @property
    def epilogue(self) -> list[str]:
        path: list[str] = tools()[2].epilogue(self.compiled[0])
        return path

    @property
    def clocks(self) -> float:
        """Of a multiprocessor, block after block.

        A cooperative epilogue stands behind its block's products. In ping-pong a warp group takes
        the exponentials of its block while the other multiplies, so that the longer of the two
        counts, and at the ends of the launch the shorter once.
        """
        code, nvcc, groups, steps = self.compiled[0], tools()[2], self.warps // 4, -(-self.h // 64)
        rate = ASSUMED["of it attained by a library"] * ASSUMED["of that by a main loop of ours"]
        products = groups * nvcc.tensor_cycles(code) * steps / rate
        # Each scheduler has a warp of every group; one alone does not fill its slots.
        between = ASSUMED["clocks from one instruction of a warp to its next"]
        issued = len(self.epilogue) * max(groups, between)
        if self.overlaps:  # with the other group's own
            issued += len(nvcc.main_loop(code)) * steps
        powers = 32 * self.warps * sum("MUFU.EX2" in line for line in self.epilogue)
        epilogue = max(issued, powers / ASSUMED["exponentials a clock of one"])
        rounds = math.ceil(self.blocks / ASSUMED["multiprocessors"])
        if self.overlaps:
            return rounds * max(products, epilogue) + min(products, epilogue)
        return rounds * (products + epilogue)


@cache
def _compiled(file: str) -> tuple[dict[bool, str], dict[str, int]]:
    """Of both kernels of a file, by whether E is stored."""
    nvcc = tools()[2]
    with tempfile.TemporaryDirectory() as folder:
        _, cubin = nvcc.compiled(file, "sm_90a", Path(folder))
        return nvcc.product_kernels(cubin), nvcc.resources(cubin)

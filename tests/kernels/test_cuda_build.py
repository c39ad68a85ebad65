"""What nvcc makes of csrc/cuda, without a GPU: registers, spills, products that wait for another.

`make cuda` brings nvcc and CUTLASS; CUDACXX and FASTPO_CUTLASS name others.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from _nvcc import (
    CUTLASS,
    GEMM,
    NVCC,
    PRODUCTS,
    SOURCES,
    compiled,
    epilogue,
    has_cutlass,
    main_loop,
    product_kernels,
    run,
    tensor_cycles,
)

# One worker for all tests of a source: each would compile it for itself.
CASES = [
    pytest.param(name, sm, marks=pytest.mark.xdist_group(name))
    for name, (devices, *_) in SOURCES.items()
    for sm in devices
]
MADE = [pytest.param(name, marks=pytest.mark.xdist_group(f"anchored_{name}")) for name in PRODUCTS]
# Words of a block, warp groups that share one, most instructions a cell where E is not stored and
# where it is.
CODE = {
    "cooperative": (256, 2, 6.1, 7.2),
    "cooperative_stats": (256, 2, 10.9, 11.9),
    "pingpong": (192, 1, 5.6, 6.7),
    "pingpong_stats": (192, 1, 10.3, 11.5),
}
SPILLED = {"anchored_pingpong_stats": 4}  # bytes, once a block: beside the first products stored
SIZES = [(n, v) for n in (8192, 4096, 896, 300, 1) for v in (151_936, 128_256, 50_257, 2000)]
# Blocks that the library's scheduler walks through, of lines "rows words swizzle order".
SCHEDULER = """
#include <cstdio>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>
int main() {
  using Params = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Params;
  unsigned rows, words;
  int swizzle, along_words;
  while (std::scanf("%u %u %d %d", &rows, &words, &swizzle, &along_words) == 4) {
    Params params;
    cutlass::KernelHardwareInfo hardware;
    hardware.sm_count = 132;
    using Order = Params::RasterOrderOptions;
    params.initialize(dim3((rows + 1) / 2 * 2, words, 1), {2, 1, 1}, hardware, swizzle,
                      along_words ? Order::AlongN : Order::AlongM);
    std::printf("%d\\n", int(params.blocks_per_problem_));
  }
}
"""

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc; `make cuda` brings one")
needs_cutlass = pytest.mark.skipif(
    not has_cutlass(), reason="FASTPO_CUTLASS names no CUTLASS headers"
)

Build = Callable[[str, str], tuple[str, Path]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("cuda")
    return functools.cache(lambda name, device: compiled(name, device, folder))


@pytest.mark.parametrize(("name", "device"), CASES)
def test_registers_and_spills(name: str, device: str, build: Build) -> None:
    if SOURCES[name] is GEMM and not has_cutlass():
        pytest.skip("FASTPO_CUTLASS names no CUTLASS headers")
    report, _ = build(name, device)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert registers and spills, report
    assert max(registers) <= SOURCES[name][1]
    assert max(spills) <= SPILLED.get(name, 0)
    # What ptxas says when products of tensor cores wait for one another.
    assert "serialized" not in report


@needs_cutlass
@pytest.mark.parametrize("name", MADE)
def test_machine_code_of_the_products(name: str, build: Build) -> None:
    pytest.importorskip("triton")
    words, groups, *most = CODE[name]
    for stored, code in product_kernels(build(f"anchored_{name}", "sm_90a")[1]).items():
        loop, path = main_loop(code), epilogue(code)
        # A step of 64: all of the tensor cores' time, and loads by a warp that does nothing else.
        assert groups * tensor_cycles(code) == 128 * words * 64 / 2048
        assert not any("UTMALDG" in text for text in loop) and code.count("UTMALDG") == 2
        assert len(loop) <= 64
        cells = 128 * words // (128 * groups)
        assert sum("MUFU.EX2" in text for text in path) == cells
        # Parts of 64 rows and 32 words of a warp group go out as blocks.
        assert sum("UTMASTG" in text for text in path) == (words // 32 * (2 // groups)) * stored
        assert 3 < len(path) / cells <= most[stored]


@needs_cutlass
def test_as_many_blocks_as_the_schedule_was_chosen_for(tmp_path: Path) -> None:
    from fastpo.ops.rows.anchored_cutlass import padded_blocks, swizzled

    source, program = tmp_path / "scheduler.cu", tmp_path / "scheduler"
    source.write_text(SCHEDULER)
    options = ("-std=c++17", "-arch=sm_90a", "--expt-relaxed-constexpr", f"-I{CUTLASS}")
    run(NVCC, *options, source, "-o", program)
    expected, lines = [], []
    cases = itertools.product((192, 256), SIZES, (1, 2, 4, 8), (0, 1))
    for words, (n, v), most, order in cases:
        swizzle = swizzled(n, v, words, most)
        expected.append(math.prod(padded_blocks(n, v, words, swizzle)))
        lines.append(f"{-(-n // 128)} {-(-v // words)} {swizzle} {order}")
    done = subprocess.run(
        [program], input="\n".join(lines), text=True, capture_output=True, check=True
    )
    assert list(map(int, done.stdout.split())) == expected

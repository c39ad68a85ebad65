"""What nvcc makes of csrc/cuda, without a GPU: registers, spills, products that wait for another.

`make cuda` brings nvcc and CUTLASS; CUDACXX and FASTPO_CUTLASS name others.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from _nvcc import (
    GEMM,
    NVCC,
    PRODUCTS,
    ROOT,
    SOURCES,
    compiled,
    epilogue,
    has_cutlass,
    main_loop,
    product_kernels,
    tensor_cycles,
)

# One worker for all tests of a source: each would compile it for itself.
CASES = [
    pytest.param(name, sm, marks=pytest.mark.xdist_group(name))
    for name, (devices, *_) in SOURCES.items()
    for sm in devices
]
MADE = [pytest.param(name, marks=pytest.mark.xdist_group(f"anchored_{name}")) for name in PRODUCTS]
SHARED_MEMORY = 232_448  # bytes one block may have
# Words of a block, warp groups that share one, most instructions a cell where E is not stored and
# where it is.
CODE = {
    "cooperative": (256, 2, 6.1, 7.2),
    "cooperative_stats": (256, 2, 10.9, 11.9),
    "pingpong": (192, 1, 5.6, 6.7),
    "pingpong_stats": (192, 1, 10.3, 11.5),
}
SPILLED = {"anchored_pingpong_stats": 4}  # bytes, once a block: beside the first products stored
LAYOUT = Path(__file__).with_name("anchored_layout.cu")
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


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """Of each kernel shared memory, rows, words and threads, and then its cells, see LAYOUT."""
    program = tmp_path_factory.mktemp("layout") / "layout"
    command = [NVCC, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", *GEMM[2]]
    command += [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}", str(LAYOUT)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[list[int]]] = {}
    for line in printed.splitlines():
        if line.startswith("="):
            name, *sizes = line[1:].split(",")
            found[name] = [list(map(int, sizes))]
        else:
            found[name].append(list(map(int, line.split())))
    return found


@needs_cutlass
def test_as_many_blocks_as_the_schedule_was_chosen_for(tmp_path: Path) -> None:
    from fastpo.ops.rows.anchored_cutlass import padded_blocks, swizzled

    source, program = tmp_path / "scheduler.cu", tmp_path / "scheduler"
    source.write_text(SCHEDULER)
    command = [NVCC, "-std=c++17", "-arch=sm_90a", *GEMM[2], str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
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


@needs_cutlass
@pytest.mark.xdist_group("layouts")
def test_every_product_meets_its_row_and_word(layouts) -> None:
    """Where the library says that cells are, by which labels and bias are found, is where the
    products lie in the registers: its coordinates run on the host."""
    from fastpo.ops.rows import anchored_cutlass

    assert len(layouts) == 8
    for name, ((shared, rows, words, threads), *cells) in layouts.items():
        assert shared <= SHARED_MEMORY
        assert words == anchored_cutlass.block_words("pingpong" in name)
        assert {(row, word) for *_, row, word, _, _ in cells} == {
            (row, word) for row in range(rows) for word in range(words)
        }
        assert len(cells) == rows * words
        assert threads == (128 if name.startswith("pingpong") else 256)
        visits = defaultdict(list)
        for thread, part, row, word, taken_row, taken_word in cells:
            assert (row, word) == (taken_row, taken_word)
            visits[thread, part].append((row, word))
        for visit in visits.values():
            # What `any_special` asks: columns from the first cell's on, and two rows.
            first = visit[0][1]
            assert all(0 <= word - first < 32 for _, word in visit)
            assert len({row for row, _ in visit}) == 2


@needs_cutlass
@pytest.mark.xdist_group("layouts")
def test_a_row_is_summed_in_one_order_whatever_is_kept_and_asked(layouts) -> None:
    def orders(name: str) -> dict[int, list[list[int]]]:
        """Of a row its words as each of the threads that share it adds them up."""
        found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for thread, _, row, word, _, _ in layouts[name][1:]:
            found[row][thread].append(word)
        return {row: [each[thread] for thread in sorted(each)] for row, each in found.items()}

    for schedule in ("cooperative", "pingpong"):
        first = orders(schedule)
        assert len(first) == 128 and all(len(each) == 4 for each in first.values())
        for other in (" stored", " stats", " stats stored"):
            assert orders(schedule + other) == first

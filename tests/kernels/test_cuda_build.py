"""What nvcc makes of csrc/cuda, without a GPU: registers, spills, products that wait for another.

`make cuda` brings nvcc and CUTLASS; CUDACXX and FASTPO_CUTLASS name others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
CUTLASS = os.environ.get("FASTPO_CUTLASS", "")
# file -> (architectures, most registers a thread, options)
ROWS = (("sm_80", "sm_90a"), 64, ["--fmad=false"])
# Three warp groups of 128 threads share 65,536 registers.
GEMM = (("sm_90a",), 168, ["--expt-relaxed-constexpr", "-DNDEBUG", f"-I{CUTLASS}"])
SOURCES = {
    "rows_forward.cu": ROWS,
    "rows_backward.cu": ROWS,
    "anchored.cu": GEMM,
    "anchored_stats.cu": GEMM,
}
CASES = [(name, sm) for name, (devices, *_) in SOURCES.items() for sm in devices]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc; `make cuda` brings one")


def compiled(name: str, device: str, folder: Path) -> str:
    """What ptxas says of every kernel of the file."""
    options = SOURCES[name][2]
    number = device.removeprefix("sm_")
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas=-v", f"-I{CSRC / 'include'}", *options]
    command += [f"-gencode=arch=compute_{number},code={device}", "-c", str(CSRC / "cuda" / name)]
    done = subprocess.run(
        [*command, "-o", str(folder / "kernels.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(("name", "device"), CASES)
def test_registers_and_spills(name: str, device: str, tmp_path: Path) -> None:
    if SOURCES[name] is GEMM and not (Path(CUTLASS) / "cutlass" / "cutlass.h").exists():
        pytest.skip("FASTPO_CUTLASS names no CUTLASS headers")
    report = compiled(name, device, tmp_path)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert registers and spills, report
    assert max(registers) <= SOURCES[name][1]
    assert max(spills) == 0
    # What ptxas says when products of tensor cores wait for one another.
    assert "serialized" not in report

"""What nvcc makes of csrc/cuda: its report, and the machine code as Triton's wheel reads it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
CUTLASS = os.environ.get("FASTPO_CUTLASS", "")
# architectures, most registers a thread, options
ROWS = (("sm_80", "sm_90a"), 64, ["--fmad=false"])
# Three warp groups of 128 threads share 65,536 registers; two of them give and one takes.
GEMM = (("sm_90a",), 168, ["--expt-relaxed-constexpr", "-DNDEBUG", f"-I{CUTLASS}"])
PRODUCTS = ("cooperative", "cooperative_stats", "pingpong", "pingpong_stats")
SOURCES = {"rows_forward": ROWS, "rows_backward": ROWS}
SOURCES |= {f"anchored_{name}": GEMM for name in PRODUCTS}


def has_cutlass() -> bool:
    return (Path(CUTLASS) / "cutlass" / "cutlass.h").exists()


def compiled(name: str, device: str, folder: Path) -> tuple[str, Path]:
    """What ptxas says of every kernel of the file, and their machine code."""
    assert NVCC is not None, "CUDACXX names no nvcc; `make cuda` brings one"
    number, cubin = device.removeprefix("sm_"), folder / f"{name}.{device}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas=-v", f"-I{ROOT / 'csrc' / 'include'}"]
    command += [*SOURCES[name][2], f"-gencode=arch=compute_{number},code={device}", "-cubin"]
    command += [str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr, cubin


def product_kernels(cubin: Path) -> dict[bool, str]:
    """Machine code of a file's two products by whether E is stored."""
    from _sass import disassembled

    functions = disassembled(cubin.read_bytes()).split("Function : ")[1:]
    found = {"UTMASTG" in code: code for code in functions}
    assert set(found) == {False, True}, "expected one kernel that stores, and one that does not"
    return found


def resources(cubin: Path) -> dict[str, int]:
    """The most that a kernel of the file takes; of registers what it is launched with."""
    from _sass import disassembled

    found: dict[str, int] = {}
    for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", disassembled(cubin.read_bytes())):
        found[name.lower()] = max(found.get(name.lower(), 0), int(value))
    return found


def main_loop(code: str) -> list[str]:
    """One step of 64 along the hidden size."""
    from _sass import loops

    return min((body for body in loops(code) if any("HGMMA" in x for x in body)), key=len)


def epilogue(code: str) -> list[str]:
    """What a thread runs from the last product to the next block, without bias, label and end.

    Of those each has a branch around it.
    """
    from _sass import path_behind_products

    def apart(skipped: str) -> bool:
        return "MUFU" not in skipped and (
            "FSEL" in skipped or ("FADD" in skipped and "LDG" in skipped)
        )

    return path_behind_products(code, apart)


def tensor_cycles(code: str) -> float:
    """Of the main loop's products: 128 for 64 x 256 x 16, as wide as the four units are."""
    shapes = re.findall(r"HGMMA\.(\d+)x(\d+)x(\d+)", "\n".join(main_loop(code)))
    return sum(int(m) * int(n) * int(k) / 2048 for m, n, k in shapes)

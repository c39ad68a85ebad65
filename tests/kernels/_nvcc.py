"""What nvcc makes of csrc/cuda: the extension without a GPU's runtime, and machine code of its PTX.

Built once, by the project's own CMake files, into a folder of build/without_gpu.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NVCC = os.environ.get("CUDACXX")  # one that is there by chance would make `make test` slow
CUTLASS = os.environ.get("FASTPO_CUTLASS", "")
STAND_IN = ROOT / "tests" / "ptx" / "cudart.cpp"
# architectures, most registers a thread, CMake's target
ROWS = (("sm_80", "sm_90a"), 64, "_C")
# Three warp groups of 128 threads share 65,536 registers; two of them give and one takes.
GEMM = (("sm_90a",), 168, "anchored")
PRODUCTS = ("cooperative", "cooperative_stats", "pingpong", "pingpong_stats")
SOURCES = {"rows_forward": ROWS, "rows_backward": ROWS}
SOURCES |= {f"anchored_{name}": GEMM for name in PRODUCTS}


def has_cutlass() -> bool:
    return (Path(CUTLASS) / "cutlass" / "cutlass.h").exists()


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@functools.cache
def extension() -> Path:
    """fastpo._C with PTX in place of machine code, and cudart.so beside it, its runtime.

    One process builds, others wait for it.
    """
    import pybind11

    assert NVCC is not None, "CUDACXX names no nvcc; `make cuda` brings one"
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake, ninja = shutil.which("cmake", path=tools), shutil.which("ninja", path=tools)
    assert cmake and ninja, "no cmake, or no ninja"
    given = {
        "CMAKE_BUILD_TYPE": "None",  # the host's code is not looked at
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CUDA_COMPILER": NVCC,
        "CMAKE_CUDA_ARCHITECTURES": "80-virtual;90a-virtual",
        "CMAKE_CUDA_FLAGS": "--no-compress -DNDEBUG",
        "CMAKE_CUDA_RUNTIME_LIBRARY": "None",
        "FASTPO_CUDA": "ON",
        "FASTPO_CUTLASS": CUTLASS or "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in given.items()]
    # With another compiler CMake would want to begin anew.
    build = ROOT / "build" / "without_gpu" / hashlib.sha256(repr(given).encode()).hexdigest()[:8]
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(cmake, "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *defines)
        run(cmake, "--build", build)
        library = build / "cudart.so"
        if not library.exists() or library.stat().st_mtime < STAND_IN.stat().st_mtime:
            options = ("-shared", "-cudart", "none", "-Xcompiler", "-fPIC")
            run(NVCC, *options, STAND_IN, "-o", library)
    (found,) = build.glob("_C*.so")
    return found


def compiled(name: str, device: str, folder: Path) -> tuple[str, Path]:
    """What ptxas says of every kernel of the file, and their machine code."""
    assert NVCC is not None
    place = extension().parent / "CMakeFiles" / f"{SOURCES[name][2]}.dir" / "cuda" / f"{name}.cu.o"
    texts = re.findall(rb"\.version [^\0]*", place.read_bytes())
    (text,) = [x for x in texts if re.search(rb"\.target %s\b" % device.encode(), x)]
    ptx, cubin = (folder / f"{name}.{device}.{kind}" for kind in ("ptx", "cubin"))
    ptx.write_bytes(text)
    options = ("-cubin", f"-arch={device}", "-Xptxas=-v,-warn-spills")
    return run(NVCC, *options, ptx, "-o", cubin), cubin


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


if __name__ == "__main__":
    print(extension())

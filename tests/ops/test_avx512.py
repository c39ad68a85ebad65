"""The AVX-512 row kernels where the processor has none: the same source over emulated intrinsics.

Where it has, the tests of the row kernels run them as they are.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastpo.ops.rows import cpu as rows_cpu

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
# Inlined, every lane of every intrinsic: a minute of compiling.
EMULATED = ["-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-fno-inline"]
EMULATED += ["-include", "tests/avx512_emulated.h"]

# Loads the extension of argv[1] in place of the installed one, then runs pytest on the rest.
RUN = """
import importlib.util, sys
found = importlib.util.spec_from_file_location("fastpo._C", sys.argv[1])
built = sys.modules["fastpo._C"] = importlib.util.module_from_spec(found)
found.loader.exec_module(built)
from fastpo.ops import rows_cpu
assert rows_cpu._C is built and rows_cpu.ISA == 0
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""

pytestmark = [
    pytest.mark.skipif(rows_cpu.ISA != 1, reason="needs a processor with AVX2 and no AVX-512"),
    pytest.mark.skipif(platform.system() != "Linux", reason="needs a Linux compiler"),
    pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"),
]


def build(folder: Path) -> Path:
    """An extension whose one table of row functions is that of AVX-512."""
    pybind11 = pytest.importorskip("pybind11")
    flags = [*FLAGS, f"-I{CSRC / 'include'}", f"-I{pybind11.get_include()}"]
    flags.append(f"-I{sysconfig.get_paths()['include']}")
    sources = {
        "bindings.cpp": ["-fvisibility=hidden"],
        "cpu/rows.cpp": [],
        "cpu/rows_avx512.cpp": [*EMULATED, "-DkRowsAvx512=kRowsScalar"],
    }
    objects = [str(folder / f"{Path(name).stem}.o") for name in sources]
    for (name, more), made in zip(sources.items(), objects, strict=True):
        run(CXX, *flags, *more, "-c", str(CSRC / name), "-o", made)
    extension = folder / "_C.so"
    run(CXX, "-shared", "-fopenmp", *objects, "-o", str(extension))
    return extension


def run(*command: str | None) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_rows_with_emulated_intrinsics(tmp_path: Path) -> None:
    extension = build(tmp_path)
    tests = ["tests/ops/test_rows_native.py", "tests/ops/test_pair_rows.py"]
    report = run(sys.executable, "-c", RUN, str(extension), "-q", "-p", "no:cacheprovider", *tests)
    assert " passed" in report and "failed" not in report

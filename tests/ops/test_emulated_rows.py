"""Row kernels for a processor that is not here: the same source over emulated intrinsics.

Where it is, the tests of the row kernels run them as they are.
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
EMULATED = ["-mavx2", "-mfma", "-mf16c", "-Wno-psabi"]
TABLES = {
    # Inlined, every lane of every intrinsic: a minute of compiling.
    "AVX-512": ("avx512", "Avx512", ["-fno-inline", "-include", "tests/emulated/avx512.h"]),
    "NEON": ("neon", "Neon", ["-Itests/emulated"]),
}
TESTS = (
    "tests/ops/test_rows_native.py",
    "tests/ops/test_pair_rows.py",
    "tests/kernels/test_words.py",
)

# Loads the extension of argv[1], of the instruction set argv[2] alone, in place of the installed
# one, then runs pytest on the rest.
RUN = """
import importlib.util, sys
found = importlib.util.spec_from_file_location("fastpo._C", sys.argv[1])
built = sys.modules["fastpo._C"] = importlib.util.module_from_spec(found)
found.loader.exec_module(built)
from fastpo.ops.rows import cpu
assert cpu._C is built and cpu.ISAS == (sys.argv[2],), (cpu._C, cpu.ISAS)
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""

pytestmark = [
    pytest.mark.skipif("AVX2" not in rows_cpu.ISAS, reason="needs a processor with AVX2"),
    pytest.mark.skipif(platform.system() != "Linux", reason="needs a Linux compiler"),
    pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"),
]


def run(*command: str | None) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compiled(source: str, folder: Path, *flags: str) -> str:
    made = str(folder / f"{Path(source).stem}.o")
    include = f"-I{CSRC / 'include'}"
    run(CXX, *FLAGS, include, *flags, "-c", str(CSRC / source), "-o", made)
    return made


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What stands around the one table of row functions that it asks for, the scalar one."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("around")
    python = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    bindings = compiled("bindings.cpp", folder, "-fvisibility=hidden", *python)
    return [bindings, *(compiled(f"cpu/{name}.cpp", folder) for name in ("product", "rows"))]


@pytest.mark.parametrize("isa", TABLES)
def test_rows_with_emulated_intrinsics(isa: str, around: list[str], tmp_path: Path) -> None:
    if isa in rows_cpu.ISAS:
        pytest.skip("this processor has it")
    name, table, flags = TABLES[isa]
    as_scalar = f"-DkRows{table}=kRowsScalar"
    rows = compiled(f"cpu/rows_{name}.cpp", tmp_path, *EMULATED, *flags, as_scalar)
    extension = tmp_path / "_C.so"
    run(CXX, "-shared", "-fopenmp", *around, rows, "-o", str(extension))
    given = ("-q", "-p", "no:cacheprovider", "-k", isa, *TESTS)
    report = run(sys.executable, "-c", RUN, str(extension), isa, *given)
    assert " passed" in report and "failed" not in report

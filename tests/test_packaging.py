"""What is shipped: a wheel with the extension and the Triton kernels under fastpo, an sdist."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout"),
]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a compiler: the backend only collects files."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=ROOT)
    return next(folder.glob("fastpo-*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Path:
    """Built from the unpacked sdist, so that one misses nothing; without CUDA, for speed."""
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("fastpo-*/"))
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    settings = ("--config-settings=cmake.define.FASTPO_CUDA=OFF", "--wheel-dir", str(folder))
    run(*pip, *settings, str(source), cwd=folder)
    return next(folder.glob("fastpo-*.whl"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A directory with nothing but the wheel's contents, as site-packages has them."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_kernels_is_no_package() -> None:
    """`kernels` on PyPI is Hugging Face's loader, and transformers imports it when it can."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastpo"}
    for name in (*KERNELS, "__init__.py"):
        assert f"fastpo/kernels/{name}" in names
    assert "fastpo/py.typed" in names
    assert "fastpo/_C.pyi" in names
    assert any(name.startswith("fastpo/_C.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".pyc"))]


def test_wheel_imports_alone(installed: Path, tmp_path: Path) -> None:
    """Only the unpacked wheel on the path, outside the checkout: no editable finder, no sources."""
    modules = ", ".join(f"fastpo.kernels.{Path(name).stem}" for name in KERNELS)
    program = f"""
import importlib.util, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
checkout = ({str(ROOT)!r}, {str(ROOT.parent)!r})
sys.path = [{str(installed)!r}] + [p for p in sys.path if p not in checkout]
import fastpo, fastpo._C, {modules}
from fastpo.ops.rows import cpu
print(fastpo.__file__, fastpo._C.__file__, fastpo.kernels.__path__, fastpo._C.has_cuda)
assert importlib.util.find_spec("kernels") is None or "fastpo" not in str(
    importlib.util.find_spec("kernels").submodule_search_locations)
"""
    output = run(sys.executable, "-c", program, cwd=tmp_path)
    assert output.count(str(installed)) == 3, output
    assert output.strip().endswith("False")


def test_checkout_imports_without_installation(tmp_path: Path) -> None:
    """With the checkout on the path: the kernels are found, the torch rows serve without _C."""
    program = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path = [{str(ROOT)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]
import torch, fastpo, fastpo.kernels.{Path(KERNELS[0]).stem}
from fastpo.ops.rows import registry
cpu = torch.device("cpu")
print(registry.kernels("cpu").unavailable(cpu), registry.choose(None, cpu))
"""
    output = run(sys.executable, "-c", program, cwd=tmp_path)
    assert "build it with" in output or output.strip().endswith("cpu"), output


def test_import_is_light(tmp_path: Path) -> None:
    """Seconds of every start: what is heavy is loaded by those who use it."""
    program = """
import sys, torch
before = set(sys.modules)
import fastpo
heavy = {"torch._dynamo", "triton", "transformers", "trl", "peft", "datasets", "sympy"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    assert run(sys.executable, "-c", program, cwd=tmp_path).strip() == "[]"


def test_sdist_contents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("pyproject.toml", "csrc/CMakeLists.txt", "csrc/cuda/cuda.cmake", "LICENSE"):
        assert path in names
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if name.startswith("build/")]

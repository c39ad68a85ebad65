"""What is shipped: a wheel with the extension and the Triton kernels under fastpo, an sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import fastpo

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout"),
]


def run(*command: str, cwd: Path, **environment: str) -> str:
    everything = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=cwd, env=everything, capture_output=True, text=True, check=False
    )
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
    return unpacked(wheel, tmp_path_factory.mktemp("site"))


def unpacked(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


# Only what lies in a directory is fastpo then: neither the checkout nor its editable finder.
ALONE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path = [{path!r}] + [p for p in sys.path if p not in {checkout!r}]
"""


def alone(path: Path) -> str:
    return ALONE.format(path=str(path), checkout=(str(ROOT), str(ROOT.parent)))


def test_kernels_is_no_package() -> None:
    """`kernels` on PyPI is Hugging Face's loader, and transformers imports it when it can."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_constraints_fit_torch_with_cuda() -> None:
    """Which of NVIDIA's libraries it brings is its own choice: a pin beside it conflicts, and no
    `make` works where the index has no torch for CPUs."""
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    of_compilers = {"cccl", "crt", "nvcc"}
    ours = {"nvidia-cutlass", "nvidia-nvvm", *(f"nvidia-cuda-{name}" for name in of_compilers)}
    assert {name for name in pinned if re.match("nvidia|cuda", name)} <= ours


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
{alone(installed)}
import importlib.util
import fastpo, fastpo._C, {modules}
from fastpo.ops.rows import cpu
print(fastpo.__file__, fastpo._C.__file__, fastpo.kernels.__path__, fastpo._C.has_cuda)
assert importlib.util.find_spec("kernels") is None or "fastpo" not in str(
    importlib.util.find_spec("kernels").submodule_search_locations)
"""
    output = run(sys.executable, "-c", program, cwd=tmp_path)
    assert output.count(str(installed)) == 3, output
    assert output.strip().endswith("False")


BUILD = "from scikit_build_core.build import build_wheel; build_wheel('..')"


@pytest.fixture(scope="session")
def pure(tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Path:
    """The wheel that a machine without a compiler builds from the sdist."""
    folder = tmp_path_factory.mktemp("pure")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    said = run(
        *(sys.executable, "-c", BUILD), cwd=next(folder.glob("fastpo-*/")), CXX="/nowhere/c++"
    )
    assert "no extension was built, see `fastpo info`" in said
    return next(folder.glob("fastpo-*.whl"))


def test_without_a_compiler_it_is_python_alone(pure: Path, wheel: Path) -> None:
    assert pure.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure) as archive, zipfile.ZipFile(wheel) as whole:
        missing = {*whole.namelist()} - {*archive.namelist()}
        assert all(name.startswith("fastpo/_C.") and name.endswith(".so") for name in missing)
        assert len(missing) == 1


def test_without_the_extension_torch_serves(pure: Path, tmp_path: Path) -> None:
    program = f"""
{alone(unpacked(pure, tmp_path / "site"))}
import torch, fastpo
from fastpo.info import facts, text
hidden, head, labels = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
hidden.requires_grad_()
logps = fastpo.linear_logps(hidden, head, labels).logps
logps.sum().backward()
eager = torch.log_softmax(hidden.detach() @ head.T, -1).gather(1, labels[:, None])[:, 0]
torch.testing.assert_close(logps.detach(), eager)
assert hidden.grad.abs().sum() > 0
assert facts()["backends"]["cpu"]["chosen"] == "torch"
print(text(facts()))
"""
    said = run(sys.executable, "-c", program, cwd=tmp_path)
    assert "\n  cpu           no: fastpo._C is not there" in said
    assert "Without it CPUs run plain PyTorch, and GPUs Triton's kernels." in said


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_the_wheels_are_compiled_by(machine: str, tmp_path: Path) -> None:
    """zig, for glibc 2.28: what is not of the processor at hand, and what zig's runtime lacks."""
    pytest.importorskip("ziglang")
    own = {"x86_64": "zig/cpu_model", "aarch64": "cpu/rows_neon"}[machine]
    names = ("cpu/rows", "cpu/rows_scalar", "zig/on_gomp", own)
    sources = [ROOT / f"csrc/{name}.cpp" for name in names]
    zig = (sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.2.28")
    flags = ("-std=c++17", "-O1", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-c")
    include = ("-I", str(ROOT / "csrc/include"))
    for source in sources:
        run(*zig, *flags, *include, str(source), "-o", f"{source.stem}.o", cwd=tmp_path)
    missing = run("nm", "-u", "rows.o", cwd=tmp_path)
    runtime = (ROOT / "csrc/zig/on_gomp.cpp").read_text(encoding="utf-8")
    called = set(re.findall(r"__kmpc_\w+", missing))
    assert called and called <= set(re.findall(r" (__kmpc_\w+)\(", runtime))
    # On aarch64 torch's OpenMP is loaded for torch alone: no name of it is there for everyone.
    assert not re.findall(r"GOMP_\w+|omp_\w+", run("nm", "-u", "on_gomp.o", cwd=tmp_path))


def test_an_extension_may_be_declined(sdist: Path, tmp_path: Path) -> None:
    """FASTPO_PURE: no compiler is looked for, so that a broken one is no matter."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("fastpo-*/"))
    said = run(sys.executable, "-c", BUILD, cwd=source, FASTPO_PURE="ON", CXX="/nowhere/c++")
    assert "CMake" not in said and next(tmp_path.glob("fastpo-*-py3-none-any.whl"))


def test_a_checkout_is_not_built_without_its_extension(tmp_path: Path, sdist: Path) -> None:
    """`pip install -e .`: whoever works on the C++ must see that it does not compile."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("fastpo-*/"))
    build = "from scikit_build_core.build import build_editable; build_editable('..')"
    with pytest.raises(AssertionError, match=r"Could not find (the )?compiler"):
        run(sys.executable, "-c", build, cwd=source, CXX="/nowhere/c++")


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
    assert "builds it where" in output or output.strip().endswith("cpu"), output


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


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_version_is_the_packages_own(pure: Path) -> None:
    """It is written in fastpo/__init__.py and nowhere else."""
    assert metadata_of(pure)["Version"] == fastpo.__version__
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional")[0]
    assert 'dynamic = ["version"]' in table and "\nversion =" not in table


def test_extras_that_messages_name_are_there(pure: Path) -> None:
    extras = {"trl", "peft", "flash", "bench", "plots", "real", "docs", "dev"}
    assert {*metadata_of(pure).get_all("Provides-Extra")} == extras
    files = [*(ROOT / "fastpo").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"(?:fastpo|\.)\[([\w,]+)\]['`\"]", text))
    assert {"trl", "plots"} <= named <= extras


def test_sdist_contents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("pyproject.toml", "csrc/CMakeLists.txt", "csrc/cuda/cuda.cmake", "LICENSE"):
        assert path in names
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if name.startswith("build/")]

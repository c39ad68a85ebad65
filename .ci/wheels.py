"""Wheels for Linux without a container: zig compiles for glibc 2.28, for aarch64 as well.

    python .ci/wheels.py dist --python 3.11 3.13 --machine x86_64 aarch64

Every interpreter lends its headers; only those found here can. Python runs this that has ziglang,
auditwheel and wheel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.28"
MOST_BYTES = 2 * 2**20


def interpreter(version: str) -> Path | None:
    """On the PATH, else among pyenv's."""
    found = shutil.which(f"python{version}")
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    candidates = [*([Path(found)] if found else []), *pyenv]  # pyenv's shims run nothing
    return next((path for path in candidates if header(path).is_file()), None)


def header(python: Path) -> Path:
    asked = "import sysconfig; print(sysconfig.get_path('include'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()) / "Python.h"


def compiler(machine: str, folder: Path) -> Path:
    """One file that CMake can call."""
    path = folder / f"zig-c++-{machine}"
    target = f"{machine}-linux-gnu.{GLIBC}"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m ziglang c++ -target {target} "$@"\n')
    path.chmod(0o755)
    return path


def build(python: Path, machine: str, source: Path, folder: Path) -> Path:
    """The wheel as linux_<machine>, by the interpreter's own tags."""
    version = subprocess.run(
        [python, "-c", "import sys; print('%d%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    suffix = f".cpython-{version}-{machine}-linux-gnu.so"
    defines = {
        "FASTPO_CUDA": "OFF",
        "FASTPO_ZIG": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
        "CMAKE_MODULE_LINKER_FLAGS": "-s",
        "PYTHON_MODULE_EXTENSION": suffix,
        "PYTHON_MODULE_DEBUG_POSTFIX": "",
    }
    settings = [f"cmake.define.{name}={value}" for name, value in defines.items()]
    settings += [f"build-dir={folder / (version + machine)}", "install.strip=false"]
    out = folder / "linux"
    before = {*out.glob("*.whl")}
    environment = {
        **os.environ,
        "CXX": str(compiler(machine, folder)),
        "SETUPTOOLS_EXT_SUFFIX": suffix,
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", out, source]
    command += [f"--config-settings={setting}" for setting in settings]
    subprocess.run(command, env=environment, check=True)
    (made,) = {*out.glob("*.whl")} - before
    if made.name.endswith("-none-any.whl"):  # as a user's install has it where nothing compiles
        raise RuntimeError(f"{python}: expected headers that zig finds for {machine}, got others")
    return made


def finish(wheel: Path, machine: str, out: Path) -> Path:
    """Named for the glibc it runs with, after auditwheel has read which symbols it takes."""
    audit = [sys.executable, "-m", "auditwheel", "show", wheel]
    said = subprocess.run(audit, capture_output=True, text=True, check=True).stdout
    needed = re.search(rf'"manylinux_2_(\d+)_{machine}"', said)
    if needed is None or int(needed[1]) > int(GLIBC[2:]):
        raise RuntimeError(f"{wheel.name}: expected what glibc {GLIBC} alone serves, got {said}")
    check_contents(wheel, machine)
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    tags = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel]
    name = subprocess.run(tags, capture_output=True, text=True, check=True).stdout.strip()
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel.with_name(name), out / name))


def check_contents(wheel: Path, machine: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    compiled = [name for name in names if name.endswith(".so")]
    sources = [name for name in names if name.endswith((".cpp", ".h", ".cu", ".pyc"))]
    one = len(compiled) == 1 and compiled[0].endswith(f"{machine}-linux-gnu.so")
    if not one or sources or wheel.stat().st_size > MOST_BYTES:
        got = f"{compiled}, {sources}, {wheel.stat().st_size} bytes"
        raise RuntimeError(f"{wheel.name}: expected one extension of at most 2 MiB, got {got}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", nargs="+", metavar="X.Y", default=VERSIONS)
    parser.add_argument("--machine", nargs="+", choices=MACHINES, default=MACHINES)
    options = parser.parse_args()
    found = {version: interpreter(version) for version in options.python}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for python in filter(None, found.values()):
            for machine in options.machine:
                made = finish(build(python, machine, ROOT, folder), machine, options.out)
                print(f"{made}: {made.stat().st_size / 2**20:.2f} MiB", flush=True)
    missing = [version for version, python in found.items() if python is None]
    if missing:
        print(f"no python{', python'.join(missing)} with headers here: no wheels for them")
    return int(len(missing) == len(found))


if __name__ == "__main__":
    sys.exit(main())

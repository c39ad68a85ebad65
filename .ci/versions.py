"""The lowest of what pyproject.toml claims on the oldest Python here, the newest on every other.

    python .ci/versions.py build/versions

Every Python from 3.10 that is here with its headers gets an environment of its own, the package as
a wheel, and torch without NVIDIA's libraries, see no_cuda.py. Python runs this that has ziglang,
auditwheel and wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import ROOT, VERSIONS, interpreter

# torch with the CUDA runtime that it is built for: it says that there is no device.
LOWEST_TORCH = ["torch==2.8.0", "nvidia-cuda-runtime-cu12==12.8.90"]
LOWEST = ["numpy<2.4", "transformers==4.55.4", "trl==0.18.2"]
LOWEST += ["peft==0.16.0", "accelerate==1.4.0", "datasets==3.0.0"]
HIGHEST_TORCH = ["torch", "nvidia-cuda-runtime"]
HIGHEST = ["transformers", "trl", "peft", "accelerate", "datasets"]
TESTS = [
    "tests/ops/test_linear_logps.py",
    "tests/objectives/test_objectives.py",
    "tests/objectives/test_registry.py",
    "tests/integrations/attach/test_attach.py",
    "tests/integrations/trl/test_trl_lazy.py",
]
# The patch serves TRL 1.13 and later; before, lazy logits do. What a script and a log see is
# Python's own, too.
HIGHEST_TESTS = [*TESTS, "tests/integrations/trl/test_trl.py"]
HIGHEST_TESTS += ["tests/integrations/trl/test_trl_metrics.py", "tests/cli/test_run.py"]


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def check(
    python: Path, folder: Path, torch: list[str], packages: list[str], tests: list[str]
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    version = python.name.removeprefix("python")
    wheels = [sys.executable, ROOT / ".ci" / "wheels.py", folder / "wheel"]
    run(*wheels, "--machine", "x86_64", "--python", version)
    (wheel,) = (folder / "wheel").glob("*.whl")
    pip = [folder / "bin" / "pip", "install", "-q"]
    run(*pip, "--no-deps", *torch)
    site = folder / "lib" / python.name / "site-packages"
    run(sys.executable, ROOT / ".ci" / "no_cuda.py", site / "torch")
    run(*pip, wheel, "pytest", "hypothesis", *packages)
    run(folder / "bin" / "fastpo", "info")
    run(folder / "bin" / "pytest", "-q", "-c", "pyproject.toml", "-p", "no:cacheprovider", *tests)


def main(out: str) -> None:
    pythons = [found for version in VERSIONS if (found := interpreter(version))]
    for python in pythons:
        folder = Path(out).resolve() / python.name
        if python == pythons[0]:
            check(python, folder, LOWEST_TORCH, LOWEST, TESTS)
        else:
            check(python, folder, HIGHEST_TORCH, HIGHEST, HIGHEST_TESTS)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Programs of this folder in processes of their own: they take a GPU to be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(*command: object, **more: object) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    env |= {name: str(value) for name, value in more.items()}
    given = [sys.executable, *map(str, command)]
    done = subprocess.run(given, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def printed(program: str, *arguments: object) -> list[dict]:
    """Its lines of JSON."""
    lines = run(HERE / program, *arguments).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def kernels(backend: str, every: int, *more: object) -> set[str]:
    """Names of those that ran in every so many cases of the smoke run, all of which are right.

    The modes take turns: `every` is odd. So do warps, in any order.
    """
    rows = printed("_smoke.py", backend, "--every", every, "--seed", 0, *more)
    assert rows and not [row for row in rows if row["wrong"]], rows
    return {name for row in rows for name in row["launches"]}


def passed(tests: str, chosen: str, **more: object) -> int:
    """How many of these tests pass on the GPU that is not there; none may fail."""
    plugin = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "_emulated_gpu")
    last = run(*plugin, HERE.parent / tests, "-k", chosen, **more).splitlines()[-1]
    assert "passed" in last and "skipped" not in last, last
    return int(last.split()[0])


def invariant(backend: str, **more: object) -> int:
    """How many tests of batch invariance pass there."""
    return passed("ops/test_invariance.py", f"duplicate and {backend}", **more)

"""Every example runs as its docstring says, for two steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

EXAMPLES = Path(__file__).parent.parent / "examples"
UNCHANGED = str(EXAMPLES / "run_unchanged.py")
COMMANDS = {
    "dpo": ["dpo.py"],
    "trainer": ["trainer.py"],
    "loop": ["loop.py"],
    "by_name": ["by_name.py", "simpo", "beta=2.0"],
    "by_name_groups": ["by_name.py", "infonca"],
    **{
        f"by_hand_{family}": ["by_hand.py", family]
        for family in ("policy_gradient", "distillation", "rewards", "denoising")
    },
}


def output(*arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, *arguments, "--steps", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def losses(said: str) -> list[str]:
    """Of the summary in the last line."""
    return re.findall(r"\d+\.\d{4}", said.splitlines()[-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_example(name):
    script, *rest = COMMANDS[name]
    assert losses(output(str(EXAMPLES / script), *rest))


def test_an_unchanged_script_says_the_same():
    assert "import fastpo" not in Path(UNCHANGED).read_text(encoding="utf-8")
    own, ours = output(UNCHANGED), output("-m", "fastpo", "run", UNCHANGED)
    assert losses(own) == losses(ours) != []


def test_every_example_is_run():
    run = {command[0] for command in COMMANDS.values()} | {Path(UNCHANGED).name}
    assert run == {path.name for path in EXAMPLES.glob("*.py")}

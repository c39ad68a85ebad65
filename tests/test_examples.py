"""Every example runs as its docstring says, for two steps."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.lazy import cell

EXAMPLES = Path(__file__).parent.parent / "examples"
UNCHANGED = EXAMPLES / "run_unchanged.py"
COMMANDS = {
    "dpo": ["dpo.py"],
    "trainer": ["trainer.py"],
    "trainer_smoothing": ["trainer.py", "--smoothing", "0.1"],
    "trainer_loss": ["trainer.py", "--loss", "focal"],
    "loop": ["loop.py"],
    "loop_dpo": ["loop.py", "--objective", "dpo"],
    "lazy_loop": ["lazy_loop.py"],
    "lazy_loop_accelerate": ["lazy_loop.py", "--accelerate"],
    "lazy_lightning": ["lazy_lightning.py"],
    **{
        f"lazy_models_{model}": ["lazy_models.py", model]
        for model in ("encoder_decoder", "vision", "value_head", "chunked", "rewards")
    },
    "sharded_head": ["sharded_head.py"],
    "by_name": ["by_name.py", "simpo", "beta=2.0"],
    "by_name_groups": ["by_name.py", "infonca"],
    "by_name_alias": ["by_name.py", "sigmoid"],
    **{
        f"by_hand_{family}": ["by_hand.py", family]
        for family in ("policy_gradient", "distillation", "rewards", "denoising")
    },
}


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    """In this process, where TRL is imported already; what an example patched is given back."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    fastpo.unpatch()


def losses(capsys) -> list[str]:
    """Of the summary in the last line."""
    return re.findall(r"\d+\.\d{4}", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_example(name, monkeypatch, capsys, caplog):
    script, *rest = COMMANDS[name]
    if script == "by_name.py":
        pytest.importorskip("trl", minversion="1.15")  # the first with objectives by name
    monkeypatch.setattr(sys, "argv", [script, *rest, "--steps", "2"])
    cell.told.clear()
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert losses(capsys)
    assert "full logits" not in caplog.text


def test_an_unchanged_script_says_the_same(monkeypatch, capsys):
    assert "import fastpo" not in UNCHANGED.read_text(encoding="utf-8")
    arguments = [str(UNCHANGED), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(UNCHANGED), run_name="__main__")
    own = losses(capsys)
    with fastpo.patched():
        runpy.run_path(str(UNCHANGED), run_name="__main__")
    assert losses(capsys) == own != []


def test_the_command_itself():
    """In a process of its own."""
    command = [sys.executable, "-m", "fastpo", "run", str(UNCHANGED), "--steps", "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "sft: loss" in found.stdout


def test_every_example_is_run():
    run = {command[0] for command in COMMANDS.values()} | {UNCHANGED.name}
    assert run == {path.name for path in EXAMPLES.glob("*.py")}

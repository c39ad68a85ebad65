"""`fastpo run`: what Python would do, with TRL patched."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("trl")

from fastpo.integrations.run import run_script

SCRIPT = """
import json, sys
from pathlib import Path
import helper
import trl.trainer.utils as utils

head = utils._ChunkedLogProbFunction
seen = [type(head).__name__, sys.argv, __name__, sys.path[0], helper.answer]
Path("seen.json").write_text(json.dumps(seen))
if sys.argv[-1] == "fail":
    sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A script with a neighbour to import, in the working directory."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("answer = 42")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    yield tmp_path
    sys.modules.pop("helper", None)


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("argv", [["script.py", "a", "--b=1"], ["-m", "script", "a", "--b=1"]])
def test_runs_as_main(folder, argv):
    before = sys.argv, sys.path[:]
    assert run_script(argv) == 0
    name = str(folder / "script.py") if argv[0] == "-m" else "script.py"
    assert seen(folder) == ["FusedHead", [name, "a", "--b=1"], "__main__", str(folder), 42]
    assert (sys.argv, sys.path) == before


def test_trl_is_given_back(folder):
    import trl.trainer.utils as utils

    head = utils._ChunkedLogProbFunction
    with pytest.raises(SystemExit) as stopped:
        run_script(["script.py", "fail"])
    assert stopped.value.code == 3
    assert utils._ChunkedLogProbFunction is head


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["absent.py"], 2, "script: expected a file, got 'absent.py'"),
        (["-m", "absent"], 1, "module: expected one that can be imported, got 'absent'"),
        (["-m", "absent.part"], 1, "module: expected one that can be imported, got 'absent.part'"),
        ([], 2, "expected a script or -m and a module, got []"),
        (["-m"], 2, "expected a script or -m and a module, got ['-m']"),
        (["--help"], 2, "expected a script or -m and a module, got ['--help']"),
    ],
)
def test_nothing_to_run(argv, code, message, capsys):
    assert run_script(argv) == code
    said = capsys.readouterr().err
    assert f"fastpo run: {message}\n" in said
    assert "usage: fastpo run (script.py | -m module) [arguments]" in said


PROGRAM = """
import sys
import fastpo
assert not {"trl", "transformers"} & set(sys.modules), "import fastpo imports others"
from fastpo.integrations.run import run_script
sys.exit(run_script(sys.argv[1:]))
"""


def test_exit_code_of_the_process(folder):
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, "script.py", "fail"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 3, found.stderr
    assert seen(folder)[0] == "FusedHead"

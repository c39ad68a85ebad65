"""`fastpo run`: what Python would do, with TRL patched."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import textwrap
import zipapp
from pathlib import Path

import pytest

from fastpo.integrations.run import run_script

FASTPO = ["-m", "fastpo", "run"]

# What a script can see of how it was started and how it ends, printed by the last call at exit.
PROBE = b'''# coding: latin-1
"""The script."""
from __future__ import annotations

import atexit, builtins, dataclasses, inspect, json, os, pickle, signal, sys, threading, typing

import dill


@dataclasses.dataclass
class Row:
    text: Text = "caf\xe9"


Text = str


def tried(call, *arguments):
    try:
        return repr(call(*arguments))
    except Exception as error:
        return repr(error)


def plain(value):
    if isinstance(value, (str, type(None), dict, bool)):
        return value
    if value is builtins:
        return "builtins"
    names = ("name", "path", "origin", "parent", "cached", "submodule_search_locations", "archive")
    found = {name: str(getattr(value, name, None)) for name in names}
    loader = getattr(value, "loader", value)
    return found | {"kind": getattr(loader, "__name__", type(loader).__name__)}


def main():
    module = sys.modules["__main__"]
    return {
        "own": vars(module) is globals() and module is sys.modules.get("__mp_main__", module),
        "names": {name: plain(value) for name, value in vars(module).items() if name[:2] == "__"},
        "argv": sys.argv,
        "path": sys.path,
        "excepthook": sys.excepthook is sys.__excepthook__,
    }


def late():
    threading.main_thread().join()
    seen["late"] = __name__, Row.__module__, tried(pickle.dumps, Row())


def last():
    at_exit = main()
    for name in ("__file__", "__cached__"):
        at_exit["names"].pop(name, None)
    print(json.dumps(seen | {"at exit": at_exit}))


file = globals()["__file__"]
seen = {
    "main": main(),
    "flags": [sys.flags, sys.warnoptions, sys._xoptions, sys.getrecursionlimit()],
    "environment": dict(os.environ),
    "signals": [repr(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
    "hints": tried(typing.get_type_hints, Row),
    "pickle": tried(pickle.loads, pickle.dumps(Row())),
    "dill": tried(dill.dumps, late),
    "source": [tried(inspect.getsource, late), tried(inspect.getsourcefile, late)],
    "rest of the input": sys.stdin.read(),
}
if __package__:
    from . import helper as sibling
    seen["sibling"] = sibling.__name__
try:
    import helper
    seen["helper"] = helper.__file__
except ImportError as error:
    seen["helper"] = repr(error)
os.chdir("/")
seen["there"] = os.path.exists(file)
atexit.register(last)
atexit.register(lambda: seen.setdefault("order", "before the last"))
threading.Thread(target=late).start()
if __name__ == "__main__":
    sys.exit(5)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The probe in every shape that Python runs, beside a module to import."""
    root = tmp_path_factory.mktemp("run")
    (root / "package").mkdir()
    (root / "elsewhere").mkdir()
    (root / "probe.py").write_bytes(PROBE)
    (root / "elsewhere" / "link.py").symlink_to(root / "probe.py")
    (root / "package" / "__main__.py").write_bytes(PROBE)
    for name in ("helper.py", "package/helper.py", "package/__init__.py"):
        (root / name).touch()
    zipapp.create_archive(root / "package", root / "probe.pyz")
    return root


def outcome(command, folder, text=b""):
    """Exit code, output and errors."""
    done = subprocess.run(command, input=text, capture_output=True, cwd=folder, timeout=120)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


VIEWS = {
    "script": ["probe.py", "--help", "-m", ""],
    "link": ["package/../elsewhere/link.py"],
    "module": ["-m", "probe", "a", "--b=1"],
    "package": ["-m", "package", "-m", "x"],
    "archive": ["./probe.pyz", "a"],
    "input": ["-", "a"],
}


def same_view(python, fastpo, folder, text=b"the rest"):
    code, view, said = outcome(python, folder, text)
    assert (code, said) == (5, "")
    code, own, said = outcome(fastpo, folder, text)
    assert (code, said) == (5, "")
    views = [json.loads(x) for x in (own, view)]
    for name in ("PYTHONPATH", "FASTPO_RUN"):  # by these its processes are patched
        for one in views:
            one["environment"].pop(name, None)
    assert views[0] == views[1]


@pytest.mark.parametrize("name", VIEWS)
def test_a_script_sees_what_python_shows(name, folder):
    # Python reads other encodings from files only.
    text = PROBE.decode("latin-1").replace("latin-1", "utf-8") if name == "input" else ""
    python = [sys.executable]
    same_view(python + VIEWS[name], python + FASTPO + VIEWS[name], folder, text.encode())


@pytest.mark.parametrize("target", ["probe.py", "package"])
def test_options_of_the_interpreter_hold(target, folder):
    python = [sys.executable, "-I", "-O", "-W", "error::UserWarning", "-X", "utf8"]
    same_view([*python, target], python + FASTPO + [target], folder)


def test_the_installed_command(folder):
    command = Path(sysconfig.get_path("scripts"), "fastpo")
    if not command.exists():
        pytest.skip("not installed")
    same_view([sys.executable, "probe.py"], [str(command), "run", "probe.py"], folder)


ENDINGS = {
    "text": "import sys; sys.exit('a text')",
    "error": """
        def call():
            try:
                {}["missing"]
            except KeyError as error:
                raise ValueError("chained") from error
        call()
        """,
    "syntax": "def",
    # A shell's background jobs are born deaf to it.
    "interrupt": """
        import os, signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        """,
    "terminate": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "nobody reads": """
        import os
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)
        print("lost")
        """,
    "hook": """
        import atexit, sys
        def hook(kind, value, trace):
            print(kind, value.__traceback__ is trace is sys.last_traceback, file=sys.stderr)
            print(trace.tb_frame.f_code.co_name, trace.tb_lineno, file=sys.stderr)
        sys.excepthook = hook
        atexit.register(lambda: print(sys.excepthook is hook, file=sys.stderr))
        raise ValueError
        """,
}


@pytest.mark.parametrize("name", [*ENDINGS, "absent module", "module error"])
def test_a_script_ends_as_under_python(name, tmp_path):
    for ending, source in ENDINGS.items():
        (tmp_path / f"{ending}.py").write_text(textwrap.dedent(source))
    arguments = [f"{name}.py"]
    if "module" in name:
        arguments = ["-m", name.replace("module ", "").split()[0]]
    python = outcome([sys.executable, *arguments], tmp_path)
    assert python[0] != 0
    assert outcome([sys.executable, *FASTPO, *arguments], tmp_path) == python


OPTIONS = "--lazy, --shared-prompts, --padding-free before the script"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent.py"], "script: expected a file, got 'absent.py' (No such file or directory)"),
        ([], "expected a script or -m and a module, got []"),
        (["-m"], "expected a script or -m and a module, got ['-m']"),
        (["--shared", "x.py"], f"option: expected one of {OPTIONS}, got --shared"),
        (["--lazy", "--fast", "-m", "x"], f"option: expected one of {OPTIONS}, got --fast"),
        (
            ["--shared-prompts", "--padding-free", "x.py"],
            "--padding-free: expected without --shared-prompts, got both",
        ),
    ],
)
def test_nothing_to_run(argv, message, capsys):
    assert run_script(argv) == 2
    said = capsys.readouterr().err
    assert f"fastpo run: error: {message}\n" in said
    options = "[--lazy] [--shared-prompts] [--padding-free]"
    what = "(script.py | folder | archive | - | -m module) [arguments]"
    assert f"usage: fastpo run {options} {what}" in said


PATCHED = """
import multiprocessing, sys, threading

early = {"trl", "transformers", "huggingface_hub"} & set(sys.modules)
if __name__ == "__main__":
    assert not early, "what the script sets in os.environ would come too late"

import trl.trainer.utils as utils

class Seen(str):
    pass

def head():
    return Seen(type(utils._ChunkedLogProbFunction).__module__.partition(".")[0])

def late():
    threading.main_thread().join()
    print("thread", head())

if __name__ == "__main__":
    threading.Thread(target=late).start()
    print("script", head())
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.apply(head))
"""


def test_trl_is_patched_to_the_end_and_in_children(tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "script.py").write_text(PATCHED)
    code, said, errors = outcome([sys.executable, *FASTPO, "script.py"], tmp_path)
    assert code == 0, errors
    assert dict(line.split() for line in said.splitlines()) == dict.fromkeys(
        ("script", "fork", "spawn", "forkserver", "thread"), "fastpo"
    )


SHARING = """
import multiprocessing, sys
from functools import partial

import trl.trainer.dpo_trainer as dpo

def sharing():
    return str(dpo.add_fused_lm_head.sharing)

if __name__ == "__main__":
    print("script", sharing(), *sys.argv[1:])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("child", pool.apply(sharing))
"""


@pytest.mark.parametrize(
    ("options", "target", "shared"),
    [
        (["--padding-free"], ["script.py"], "False"),
        (["--lazy", "--shared-prompts"], ["-m", "script"], "True"),
    ],
)
def test_options_of_the_patch(options, target, shared, tmp_path):
    pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
    (tmp_path / "script.py").write_text(SHARING)
    command = [sys.executable, *FASTPO, *options, *target, "--padding-free"]
    code, said, errors = outcome(command, tmp_path)
    assert code == 0, errors
    assert said.splitlines() == [f"script {shared} --padding-free", f"child {shared}"]


PROCESSES = """
import os, subprocess, sys

if len(sys.argv) > 1:
    import transformers
    import trl.trainer.utils as utils

    lazy = type(vars(transformers.PreTrainedModel)["post_init"]).__module__
    print(sys.argv[1], lazy, type(utils._ChunkedLogProbFunction).__module__)
    sys.stdout.flush()
if sys.argv[1:] != ["grandchild"]:
    name = "child" if len(sys.argv) == 1 else "grandchild"
    subprocess.run([sys.executable, "script.py", name], check=True)
"""


def test_processes_of_a_script_are_patched(tmp_path):
    """`llamafactory-cli train` and `axolotl train` start others that train."""
    pytest.importorskip("trl", minversion="1.15")
    (tmp_path / "script.py").write_text(PROCESSES)
    (tmp_path / "sitecustomize.py").write_text("import sys; print('own', sys.argv[1:])")
    command = ["env", f"PYTHONPATH={tmp_path}", sys.executable, *FASTPO, "--lazy", "script.py"]
    code, said, errors = outcome(command, tmp_path)
    assert code == 0, errors
    head = "fastpo.integrations.trl.head"
    lines = [line for line in said.splitlines() if not line.startswith("own")]
    lazy = "fastpo.integrations.lazy.everywhere"
    assert lines == [f"child {lazy} {head}", f"grandchild {lazy} {head}"]
    assert said.count("own") == 3, "the module of that name that was there is read, too"


def test_a_process_that_imports_nothing_pays_little(tmp_path):
    (tmp_path / "script.py").write_text(
        "import subprocess, sys\n"
        'code = \'import sys; print(sorted({"torch", "transformers", "trl"} & {*sys.modules}))\'\n'
        "subprocess.run([sys.executable, '-c', code], check=True)\n"
    )
    code, said, errors = outcome([sys.executable, *FASTPO, "--lazy", "script.py"], tmp_path)
    assert (code, said.strip()) == (0, "[]"), errors

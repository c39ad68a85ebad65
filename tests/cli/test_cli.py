"""The command line: help, exit codes, and messages instead of tracebacks."""

import argparse
import os
import re
import shlex
import subprocess
import sys

import pytest

from fastpo import cli, objectives
from fastpo.planning import cli as planning

COMMANDS = ("demo", "run", "plan", "objectives", "bench", "info")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"fastpo {command}" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {command}" in text for command in COMMANDS)


def parsers(parser):
    """Of every command and subcommand, by what is typed."""
    found = {parser.prog: parser}
    for action in parser._actions:
        for below in (action.choices or {}).values() if action.nargs == argparse.PARSER else ():
            found |= parsers(below)
    return found


PARSERS = parsers(cli._parser())


@pytest.mark.parametrize("command", PARSERS)
def test_help_shows_an_example_that_can_be_typed(command):
    said, _, example = (PARSERS[command].epilog or "").partition(": ")
    assert said == "example" and f"{example} ".startswith(f"{command} ")
    arguments = shlex.split(example.partition(" > ")[0])[1:]
    if command == "fastpo run":  # all behind it is the script's
        return
    assert cli._parser().parse_args(arguments).command


@pytest.mark.parametrize("command", PARSERS)
def test_help_breaks_no_option_and_no_example(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    text = PARSERS[command].format_help()
    assert (PARSERS[command].epilog or "") in text.splitlines()
    assert not re.search(r"\w-$", text, re.MULTILINE)


def test_a_stream_without_greek_shows_it_escaped():
    program = [sys.executable, "-m", "fastpo", "objectives", "dpo"]
    narrow = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(program, capture_output=True, env=narrow, timeout=120)
    assert done.returncode == 0 and b"\\u03b2" in done.stdout


def test_help_sends_nobody_to_where_nothing_is():
    assert "README" not in PARSERS["fastpo bench step"].format_help()
    assert "without a checkout" in " ".join(PARSERS["fastpo bench head"].format_help().split())


def test_the_examples_are_of_every_command():
    assert {f"fastpo {command}" for command in COMMANDS} <= set(PARSERS)
    assert {"fastpo plan head", "fastpo bench head", "fastpo bench readme"} <= set(PARSERS)


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("fastpo 0.")


def test_plan_prints_what_the_head_would_do(capsys):
    assert (
        cli.main(["plan", "head", "1000", "32000", "512", "--dtype", "float32", "--frozen-head"])
        == 0
    )
    text = capsys.readouterr().out
    assert "frozen" in text
    assert "1000 x 32000 x 512" in text


@pytest.mark.parametrize(
    ("given", "there", "missing"),
    [([], {"transformers"}, "trl"), (["--lora"], {"transformers", "trl"}, "peft")],
)
def test_a_plan_says_what_has_to_be_installed(given, there, missing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "find_spec", lambda name: name if name in there else None)
    assert cli.main(["plan", "--model", str(tmp_path), *given]) == 2
    said = capsys.readouterr().err
    assert said == f"fastpo plan: error: expected {missing}, got none; pip install 'fastpo[trl]'\n"


def test_objectives_lists_every_key(capsys):
    assert cli.main(["objectives"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{key} " in text or f"\n{key}\n" in text for key in objectives.available())


def test_objectives_of_one_family_and_one_key(capsys):
    assert cli.main(["objectives", "--family", "pairs"]) == 0
    listed = capsys.readouterr().out
    assert "\ndpo " in listed
    assert "\nkto" not in listed
    assert cli.main(["objectives", "sigmoid"]) == 0
    assert capsys.readouterr().out.startswith("dpo (pairs)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "head", "-1", "32000", "64"], "tokens: expected an integer >= 0, got -1"),
        (["plan", "head", "1", "0", "64"], "vocab: expected an integer >= 1, got 0"),
        (
            ["plan", "--device", "cpu", "head", "1", "2", "3"],
            "head: expected no options before it, got device",
        ),
        (["objectives", "nothing"], "objective: expected one of "),
        (["objectives", "--family", "nothing"], "family: expected one of transforms"),
        (["objectives", "dpo", "--family", "nothing"], "family: expected one of transforms"),
        (
            ["objectives", "dpo", "--family", "singles"],
            "family: expected none beside the key 'dpo', got 'singles'",
        ),
        (["demo", "--steps", "0"], "--steps: expected an integer >= 1, got 0"),
        (["demo", "--beta", "nan"], "--beta: expected a finite number > 0, got nan"),
        (["demo", "--seed", "-1"], "--seed: expected an integer >= 0, got -1"),
        (["demo", "--objective", "nothing"], "--objective: expected one of dpo, "),
        (["demo", "--data", "/no/such.jsonl"], "/no/such.jsonl: no such file"),
        (["demo", "--model", "/no/such"], "--model /no/such: expected a folder made by save_pre"),
        (["run", "/no/such.py"], "script: expected a file, got '/no/such.py'"),
    ],
)
def test_what_was_given_wrong_is_said_in_one_line(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["demo", "--steps", "many"], ["plan", "head", "1", "2"]]
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fastpo" in capsys.readouterr().err


def test_as_a_process(tmp_path):
    broken = tmp_path / "pairs.jsonl"
    broken.write_text('{"prompt": "a", "chosen": "b"}\n')
    command = [sys.executable, "-m", "fastpo", "demo", "--data", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "pairs.jsonl, row 1: expected prompt, chosen, rejected, got prompt, chosen" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_reader_that_leaves_early_is_no_error():
    program = [sys.executable, "-m", "fastpo", "objectives"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.wait(timeout=120) == 141
        assert running.stderr.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="asks a shell, and /dev/full")
@pytest.mark.parametrize(
    ("to", "code", "said"),
    [(">&-", 0, ""), (">/dev/full", 1, "fastpo: error: [Errno 28] No space left on device\n")],
)
def test_an_output_that_takes_nothing(to, code, said):
    command = f"{shlex.quote(sys.executable)} -m fastpo objectives dpo {to}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert done.stderr.startswith(said) and "Traceback" not in done.stderr

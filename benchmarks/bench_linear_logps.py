"""Time and memory of the head, in products of 2·N·H·V FLOPs, against eager PyTorch and TRL.

Every variant is checked against float64 before anything is timed; variants take turns within one
run, so that a machine that slows down slows them all. `floor` is one bare product over the same
tiles (in float32 on a CPU): the least a forward costs; d hidden adds one, d weight another.

    python benchmarks/bench_linear_logps.py                     # the CPU table of the README
    python benchmarks/bench_linear_logps.py --device cuda --dtype bfloat16 --tokens 4096 \\
        --vocab 128256 --hidden 4096 --out benchmarks/results/h200.json

Memory is measured in a fresh process per variant: the growth of the peak over inputs, less
gradients and per-token outputs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import fastpo
from fastpo import planner, reference
from fastpo.testing import HeadInputs, make_head

CHECKED_ROWS = 32


def fused(mode: str) -> Callable[[HeadInputs], Tensor]:
    budget = {"lean": 0, "keep": 2**62}.get(mode)

    def logps(x: HeadInputs) -> Tensor:
        result = fastpo.linear_logps(x.hidden, x.weight, x.labels, budget=budget).logps
        assert result is not None
        return result

    return logps


def eager(x: HeadInputs) -> Tensor:
    log_p = torch.log_softmax((x.hidden @ x.weight.t()).float(), -1)
    return log_p.gather(1, x.labels.unsqueeze(1)).squeeze(1)


def trl(x: HeadInputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.labels, 1.0, 32768, None, 1.0, ("log_probs",)
    )[0]


# name -> (function, d hidden?, d weight?, products at best)
VARIANTS: dict[str, tuple[Callable[[HeadInputs], Tensor], bool, bool, int]] = {
    "score": (fused("score"), False, False, 1),
    "frozen": (fused("frozen"), True, False, 2),
    "keep": (fused("keep"), True, True, 3),
    "lean": (fused("lean"), True, True, 3),
    "eager score": (eager, False, False, 1),
    "eager frozen": (eager, True, False, 2),
    "eager trainable": (eager, True, True, 3),
    "trl score": (trl, False, False, 1),
    "trl frozen": (trl, True, False, 2),
    "trl trainable": (trl, True, True, 3),
}


def step(name: str, x: HeadInputs) -> Tensor:
    """One forward and, where the variant has one, its backward."""
    function, hidden_grad, weight_grad, _ = VARIANTS[name]
    x.hidden.requires_grad_(hidden_grad)
    x.weight.requires_grad_(weight_grad)
    logps = function(x)
    leaves = list(x.leaves().values())
    if leaves:
        # Freed by the caller before the next variant runs.
        torch.autograd.grad((logps * -0.01).sum(), leaves)
    return logps.detach()


def bare_product(x: HeadInputs) -> None:
    """The floor: hidden·weightᵀ over the tiles `linear_logps` uses, nothing done to them."""
    n, v = len(x.labels), x.weight.shape[0]
    tiles = planner.tile_shape(n, v, x.hidden.device.type)
    buffer = x.hidden.new_empty(tiles.tokens * tiles.vocab)
    with torch.no_grad():
        for a in range(0, n, tiles.tokens):
            block = x.hidden[a : a + tiles.tokens]
            for v0 in range(0, v, tiles.vocab):
                words = x.weight[v0 : v0 + tiles.vocab]
                out = buffer[: len(block) * len(words)].view(len(block), len(words))
                torch.mm(block, words.t(), out=out)


def check(x: HeadInputs, names: list[str]) -> dict[str, float]:
    """Largest error of a log-probability against float64, on the first rows."""
    rows = HeadInputs(x.hidden[:CHECKED_ROWS].detach(), x.weight.detach(), x.labels[:CHECKED_ROWS])
    truth = reference.linear_logps(rows.hidden.double(), rows.weight.double(), rows.labels).logps
    assert truth is not None
    errors = {}
    for name in names:
        logps = step(name, rows)
        errors[name] = (logps.double() - truth).abs().max().item()
        ours = not name.startswith(("eager", "trl"))
        if ours and not bool(((logps - truth).abs() <= 2e-4 * (1 + truth.abs())).all()):
            raise SystemExit(f"{name}: wrong by {errors[name]:.2e} nats; nothing is timed")
    return errors


def timed(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def interleaved(x: HeadInputs, names: list[str], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every variant and of the floor, in turns; the first turn is thrown away."""
    # PyTorch's own 16-bit products are many times slower than float32 ones on most CPUs.
    bare = x if x.hidden.device.type == "cuda" else x.like(torch.float32, grad=False)
    runs: dict[str, list[float]] = {name: [] for name in ("floor", *names)}
    device = x.hidden.device.type
    for turn in range(repeats + 1):
        for name in runs:
            call = (lambda: bare_product(bare)) if name == "floor" else (lambda n=name: step(n, x))
            milliseconds = timed(call, device)
            if turn:
                runs[name].append(milliseconds)
        print(f"\rturn {turn} of {repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return runs


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")


def measure_memory(name: str, x: HeadInputs) -> float:
    """MiB above inputs, gradients and per-token outputs at the worst moment of one step."""
    warm = make_head(4, 512, x.hidden.shape[1], dtype=x.hidden.dtype, device=x.hidden.device.type)
    step(name, warm)
    _, hidden_grad, weight_grad, _ = VARIANTS[name]
    owed = x.hidden.nbytes * hidden_grad + x.weight.nbytes * weight_grad + 4 * len(x.labels)
    if x.hidden.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(name, x)
        return (torch.cuda.max_memory_allocated() - before - owed) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = status_kib("VmRSS")
    step(name, x)
    return (status_kib("VmHWM") - before) / 1024 - owed / 2**20


def memory_in_fresh_process(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--device", args.device]
    command += ["--dtype", args.dtype, "--tokens", str(args.tokens)]
    command += ["--vocab", str(args.vocab), "--hidden", str(args.hidden)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str) -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: installed(name) for name in ("fastpo", "torch", "triton", "trl")},
    }


def table(rows: list[dict[str, object]]) -> str:
    head = f"{'variant':<16}{'median ms':>11}{'spread':>18}{'products':>10}{'of floor':>10}"
    lines = [head + f"{'extra MiB':>11}{'max error':>11}"]
    for r in rows:
        spread = f"{r['min_ms']:.0f}–{r['max_ms']:.0f}"
        extra = "–" if r["extra_mib"] is None else f"{r['extra_mib']:.0f}"
        lines.append(
            f"{r['variant']:<16}{r['median_ms']:>11.1f}{spread:>18}{r['products']:>10.2f}"
            f"{r['fraction_of_floor']:>10.0%}{extra:>11}{r['max_error']:>11.1e}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", help="comma-separated; default: all that are installed")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory runs")
    parser.add_argument("--check", action="store_true", help="only compare with float64")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> list[str]:
    names = args.variants.split(",") if args.variants else list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"--variants: expected some of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    return [name for name in names if not name.startswith("trl") or installed("trl")]


def main() -> None:
    args = parse()
    dtype = getattr(torch, args.dtype)
    x = make_head(args.tokens, args.vocab, args.hidden, dtype=dtype, device=args.device)
    if args.memory_of:
        print(measure_memory(args.memory_of, x))
        return
    names = chosen(args)
    errors = check(x, names)
    if args.check:
        print("\n".join(f"{name:<16}{error:.2e}" for name, error in errors.items()))
        return
    runs = interleaved(x, names, args.repeats)
    floor = statistics.median(runs["floor"])
    shape = {"dtype": args.dtype, "N": args.tokens, "V": args.vocab, "H": args.hidden}
    rows: list[dict[str, object]] = []
    for name in names:
        products = statistics.median(runs[name]) / floor
        rows.append(
            {
                "variant": name,
                **shape,
                "median_ms": statistics.median(runs[name]),
                "min_ms": min(runs[name]),
                "max_ms": max(runs[name]),
                "products": products,
                "fraction_of_floor": VARIANTS[name][3] / products,
                "extra_mib": None if args.no_memory else memory_in_fresh_process(name, args),
                "max_error": errors[name],
            }
        )
    report = {**machine(args.device), "floor_ms": floor, "repeats": args.repeats, "rows": rows}
    print(f"{report['device']}, {args.dtype}, N {args.tokens}, V {args.vocab}, H {args.hidden}")
    print(f"one product: {floor:.1f} ms")
    print(table(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

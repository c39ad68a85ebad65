"""Every mode of `linear_logps` on each backend against float64: is it right on this machine?

One process a backend, side by side; a line as soon as a case is done, and the JSON with it. A case
that takes the device with it, or hangs, costs only itself: a new process goes on behind it. Exit
code: how many of the backends that are there are wrong.

    python benchmarks/gpu_smoke.py triton anchored torch --out smoke.json
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch

import fastpo
from fastpo import reference
from fastpo.bench import report
from fastpo.bench.process import LOST, leave, one_interrupt
from fastpo.ops.rows import anchored_cutlass, registry
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, make_head, max_error, rounding

Row = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, V, H: whole blocks, ragged ones, one row, many rows of few words, a model's head.
SHAPES = {
    "cuda": (
        (300, 50_304, 512),
        (300, 50_257, 500),
        (1, 128_256, 896),
        (9000, 8192, 128),
        (257, 128_256, 4096),
    ),
    "cpu": ((9, 40, 12), (1, 33, 8)),
}
MODES = ("score", "frozen", "keep", "lean")
# Twice the rule: among hundreds of cases eager is lucky in one, and nothing is drawn again. On tiny
# problems it often is.
FACTOR = {"cuda": 4.0, "cpu": 10.0}[DEVICE]
# Seconds that a case may take, the first of a process with imports and kernels to compile. None
# takes QUIET once it runs.
PATIENCE, STARTING, QUIET = (30, 60, 20) if DEVICE == "cuda" else (300, 300, 20)
# Bytes that a process may hold between two cases: the float64 of the largest leaves it 26 GB and
# more, and five backends side by side would have to find theirs in an H200's 150.
HELD = 2**32
WORKERS: set[subprocess.Popen[str]] = set()
# bf16 is wrong in Triton's interpreter itself; there these run in float32, which they are not for.
INTERPRETED = ("triton", "anchored") if DEVICE == "cpu" else ()


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    hidden: int
    dtype: str
    mode: str
    bias: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        extra = ["bias"] * self.bias
        extra += [name if name == "outputs" else f"{name} {value}" for name, value in self.options]
        sizes = f"N {self.tokens} V {self.vocab} H {self.hidden}"
        return " ".join([sizes, self.dtype, self.mode, *extra])


EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": True},
    {"options": (("softcap", 30.0),)},
    {"options": (("temperature", 0.7), ("logit_scale", -1.3))},
    {"options": (("outputs", OUTPUTS),)},
    {"options": (("temperature", "of each token"),)},
    {"options": (("support", 20),)},  # words of each token, products one by one
    {"options": (("support", 0.1),)},  # of all words, in masked tiles
)
APART = ("support", "of each token", "captured")  # in names of cases that no benchmark needs
# Of "cutlass" alone, whose schedule is the other one where nothing is said.
COOPERATIVE: dict[str, Any] = {"options": (("pingpong", False),)}
SCHEDULE = anchored_cutlass.schedule()
CAPTURED: dict[str, Any] = {"options": (("captured", True),)}  # of a GPU alone


def cases(backend: str) -> list[Case]:
    """Plain ones first: what is wrong shows in the first seconds."""
    kinds = [(shape, "bfloat16") for shape in SHAPES[DEVICE]]
    kinds += [(SHAPES[DEVICE][0], dtype) for dtype in ("float16", "float32")]
    if backend in INTERPRETED:
        kinds = [(shape, "float32") for shape in SHAPES["cpu"]]
    extras = EXTRAS + (COOPERATIVE,) * (backend == "cutlass")
    extras += (CAPTURED,) * (DEVICE == "cuda")
    found = [
        Case(*shape, dtype, mode, **extra)
        for extra, (shape, dtype), mode in itertools.product(extras, kinds, MODES)
    ]
    # Kept of some tokens, of a ragged number.
    return found + [Case(*shape, dtype, "part") for shape, dtype in kinds]


def draw(case: Case) -> HeadInputs:
    """One row far below the others, the last label the last word."""
    sizes = (case.tokens, case.vocab, case.hidden)
    x = make_head(*sizes, dtype=getattr(torch, case.dtype), device=DEVICE, bias=case.bias)
    x.labels[-1] = case.vocab - 1
    if case.tokens > 7:
        x.hidden[7] *= 30
    return x


def own(case: Case, labels: torch.Tensor) -> dict[str, Any]:
    """Options, what is each token's own drawn."""
    options = dict(case.options)
    if options.get("temperature") == "of each token":
        options["temperature"] = torch.linspace(0.5, 2.0, case.tokens, device=DEVICE)
    if "support" in options:
        share = options["support"]
        words = int(share * case.vocab) if isinstance(share, float) else share
        ids = torch.randint(0, case.vocab, (case.tokens, words), device=DEVICE)
        options["support"] = torch.cat((labels.unsqueeze(1), ids), 1)
    return options


def run(case: Case, drawn: HeadInputs, backend: str | None) -> dict[str, torch.Tensor]:
    """Statistics and gradients by name; backend None: the reference in the dtype of `drawn`."""
    x = drawn.like(drawn.hidden.dtype, grad=case.mode != "score")
    trained = case.mode not in ("score", "frozen")
    x.weight.requires_grad_(trained)
    if x.bias is not None:
        x.bias.requires_grad_(trained)
    torch.manual_seed(0)
    options = own(case, x.labels)
    outputs = options.pop("outputs", ("logps",))
    schedule = SCHEDULE._replace(pingpong=options.pop("pingpong", SCHEDULE.pingpong))
    anchored_cutlass.schedule = lambda: schedule
    operands, leaves = (x.hidden, x.weight, x.labels), x.leaves()
    upstream = torch.linspace(-1, 1, case.tokens, device=DEVICE)
    graph = options.pop("captured", False) and backend is not None
    head = partial(reference.linear_logps, *operands, bias=x.bias, **options)
    if backend is not None:
        whole = x.hidden.itemsize * case.tokens * case.vocab
        budget = {"lean": 0, "part": whole * 2 // 5}.get(case.mode, 2**60)
        options |= {"outputs": outputs, "budget": budget}
        head = partial(fastpo.linear_logps, *operands, bias=x.bias, backend=backend, **options)

    def call() -> dict[str, torch.Tensor]:
        stats = head()
        found = {name: getattr(stats, name) for name in outputs if name != "is_top1"}
        given = upstream.to(found["logps"])
        grads = torch.autograd.grad(found["logps"], [*leaves.values()], given) if leaves else ()
        found |= zip(leaves, grads, strict=True)
        return {name: y.detach() for name, y in found.items()}

    return captured(call) if graph else call()


def captured(call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a CUDA graph of it finds, which can hold no wait and nothing of another stream.

    Before, on a stream beside, kernels are compiled and loaded.
    """
    own, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(own)
    with torch.cuda.stream(side):
        call()
    own.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for x in found.values():
        x.fill_(float("nan"))
    graph.replay()
    return {name: x.clone() for name, x in found.items()}


def check(case: Case, backend: str) -> tuple[dict[str, str], float]:
    """What is further from float64 than it may be; and logps' mean error, of a sign: nats."""
    drawn, complaints = draw(case), {}
    fused = run(case, drawn, backend)
    eager = run(case, drawn, None)
    truth = run(case, drawn.like(torch.float64, grad=False), None)
    for name, value in fused.items():
        error, plain = max_error(value, truth[name]), max_error(eager[name], truth[name])
        stored = backend in INTERPRETED and name not in OUTPUTS
        slack = rounding(truth[name], torch.bfloat16 if stored else value.dtype)
        if name not in ("logps", "lse") and backend in ("anchored", "cutlass"):
            # Sums beside the label: what they cancel is as large as its distance.
            slack += rounding(truth["logps"], torch.float32)
        if not error <= FACTOR * plain + slack:
            complaints[name] = f"error {error:.1e}, eager {plain:.1e}"
    return complaints, (fused["logps"].double() - truth["logps"]).mean().item()


def work(backend: str, first: int) -> None:
    """One JSON line for each case from `first` on; where one hangs the process ends."""
    for i, case in enumerate(cases(backend)[first:], first):
        # From a thread that waits for nobody, as a signal to Python would.
        faulthandler.dump_traceback_later(STARTING if i == first else PATIENCE, exit=True)
        start, row = time.perf_counter(), {"backend": backend, "index": i, "case": str(case)}
        try:
            complaints, bias = check(case, backend)
            row |= {"status": "wrong" if complaints else "ok", "mean_error": bias} | complaints
        except Exception as error:  # shown, and the next case runs
            line = (str(error).splitlines() or ["no reason given"])[0]
            row |= {"status": "error", "reason": f"{type(error).__name__}: {line[:200]}"}
        print(json.dumps(row | {"seconds": round(time.perf_counter() - start, 2)}), flush=True)
        if row["status"] == "error" and lost():
            leave(LOST)  # its last row says so
        if DEVICE == "cuda" and torch.cuda.memory_reserved() > HELD:
            torch.cuda.empty_cache()


def lost() -> bool:
    """Whether nothing runs on the device any more: an error's words do not tell.

    Triton and our own C++ name an illegal access in words of their own, and a library calls a
    product that it does not have a CUDA error, too, which needs no new process.
    """
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def rows_of(backend: str) -> Iterator[Row]:
    """Rows of all cases, from one process after another where one dies."""
    reason = registry.unavailable(backend, torch.device(DEVICE))
    if reason is not None:
        yield {"backend": backend, "status": "refused", "reason": reason}
        return
    done, deaths, wanted = 0, 0, cases(backend)
    while done < len(wanted) and deaths < 3:
        command = [sys.executable, __file__, "--worker", backend, "--first", str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            WORKERS.add(worker)
            assert worker.stdout is not None
            for line in worker.stdout:
                yield (row := json.loads(line))
                done, deaths = row["index"] + 1, 0
        if worker.returncode not in (0, LOST):  # a case killed it or hung, or it cannot even start
            died = {"status": "died", "reason": f"exit code {worker.returncode}"}
            yield {"backend": backend, "index": done, "case": str(wanted[done])} | died
            done, deaths = done + 1, deaths + 1


@dataclasses.dataclass
class Record:
    """All rows, on paper after each."""

    path: Path | None
    rows: list[Row]
    lock: Lock = dataclasses.field(default_factory=Lock)
    running: dict[str, float] = dataclasses.field(default_factory=dict)  # backend -> last row
    stopped: bool = False

    @classmethod
    def of(cls, path: Path | None, backends: list[str]) -> Record:
        """Rows of other backends that are there already stay."""
        found = json.loads(path.read_text())["rows"] if path is not None and path.exists() else []
        return cls(path, [row for row in found if row["backend"] not in backends])

    def follow(self, backend: str) -> None:
        self.running[backend] = time.perf_counter()
        for row in rows_of(backend):
            with self.lock:
                if self.stopped:
                    return
                self.add(row)
                self.running[backend] = time.perf_counter()
        del self.running[backend]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(_line(row), flush=True)
        self.write()

    def stop(self) -> None:
        """Ends what still runs, which an interrupt does not reach inside a call of the device."""
        with self.lock:
            self.stopped = True
            for backend, last in self.running.items():
                quiet = time.perf_counter() - last
                status = "hung" if quiet > QUIET else "unfinished"
                self.add(
                    {"backend": backend, "status": status, "reason": f"quiet for {quiet:.0f} s"}
                )
        for worker in WORKERS:
            worker.kill()

    def write(self) -> None:
        if self.path is not None:
            passed = [name for name in registry.BACKENDS if self.passed(name)]
            report.write({"what": "smoke", "passed": passed, "rows": self.rows}, self.path)

    def passed(self, backend: str) -> bool:
        """Is it right in what is timed: not in options that come with tokens of their own?"""
        own = [row for row in self.rows if row["backend"] == backend]
        plain = [row["status"] for row in own if not any(x in row.get("case", "") for x in APART)]
        return "ok" in plain and set(plain) <= {"ok", "unfinished"}


def _line(row: Row) -> str:
    named = ("status", "backend", "index", "case", "seconds")
    start = " ".join(str(row[name]) for name in named[:-1] if name in row)
    rest = ", ".join(f"{name}: {value}" for name, value in row.items() if name not in named)
    return f"{start} {rest} {row.get('seconds', '-')} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("backends", nargs="*", metavar="BACKEND", help="default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; rows of others stay in it")
    parser.add_argument("--worker", metavar="BACKEND", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if DEVICE == "cpu":  # before the first import of triton: its decorator reads it
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.worker:
        work(options.worker, options.first)
        return 0
    one_interrupt()
    backends = options.backends or list(registry.BACKENDS)
    record = Record.of(options.out, backends)
    # Daemons: an interrupt ends the run, and what is done is written.
    threads = [Thread(target=record.follow, args=(name,), daemon=True) for name in backends]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        record.stop()
    wrong = {row["backend"] for row in record.rows if row["status"] not in ("ok", "refused")}
    print(f"wrong: {', '.join(sorted(wrong.intersection(backends))) or 'none'}")
    return len(wrong.intersection(backends))


if __name__ == "__main__":
    sys.exit(main())

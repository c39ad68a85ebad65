"""What a call of the head should take on a GPU that is not there: predicted, not measured.

The library's own calls run on tensors without values, and every launch is written down: bytes, from
the shapes of its operands, and products. Kernels are then compiled for the GPU, those on CUTLASS by
the nvcc of `make cuda`, and their instructions counted. ASSUMED turns those into times.

    python benchmarks/predict.py    # writes the JSON, and from it the tables of docs/kernels.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from predict_cutlass import ASSUMED, CLOCKS, FLOPS, ROOT, SCHEDULES, Fused, tools
from predict_traffic import TRAFFIC, size
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpo
from fastpo import planner
from fastpo.bench import report
from fastpo.ops.rows import anchored_cutlass as cutlass

RESULT = "benchmarks/results/h100_predicted.json"
PAGE = ROOT / "docs" / "kernels.md"
BLOCK = re.compile(rf"(?<=<!-- predicted: {RESULT} -->\n).*?(?=<!-- end of predicted -->)", re.S)

TOKENS = 8192
HEADS = ((896, 151_936), (2048, 128_256), (4096, 128_256))  # hidden, vocabulary
BACKENDS = {
    "triton": "float32 tiles",
    "anchored": "anchored",
    "cooperative": "cutlass, cooperative",
    "cutlass": "cutlass",
}
STATISTICS = ("logps", "entropy", "mean_logits", "is_top1")  # what TRL's trainers ask for


@dataclass(frozen=True)
class Case:
    name: str
    floor: int  # products that cannot be done without
    outputs: tuple[str, ...] = ("logps",)
    trains: tuple[bool, bool] = (False, False)  # hidden states, head
    budget: int | None = None


CASES = {
    "score": Case("no gradient", 1),
    "statistics": Case("no gradient, TRL's statistics", 1, STATISTICS),
    "frozen": Case("frozen head", 2, trains=(True, False)),
    "keep": Case("trained head", 3, trains=(True, True)),
    "lean": Case("trained head, nothing kept", 3, trains=(True, True), budget=0),
}


@dataclass
class Launch:
    name: str
    bytes: int  # each operand once: what leaves the cache too early is read more often
    flops: float = 0.0
    kernel: Any = None  # as _aot.py compiles it, or Fused
    grid: tuple[int, ...] = field(default=())


class Launches(TorchDispatchMode):
    """Writes down what PyTorch launches."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # inside an operator composite ones arrive whole
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.found += operator_launch(func, args, kwargs, result)
        return result


def operator_launch(func: Any, args: tuple, kwargs: dict, result: Any) -> list[Launch]:
    """None where nothing is written: of views and of memory as it comes."""
    name = func._overloadpacket.__name__
    if func.namespace != "aten" or name in ("empty", "new_empty", "empty_like", "empty_strided"):
        return []
    read, written = operands(func, args, kwargs, result)
    if not sum(map(size, written)):
        return []
    flops = 0.0
    if name in ("mm", "addmm"):
        flops = 2.0 * written[0].numel() * args[name == "addmm"].shape[1]
    moved = sum(map(size, read + written))
    if name in ("index_select", "scatter_"):  # rows or cells of what may be much larger
        moved = size(args[2]) + 2 * size(written[0] if name == "index_select" else args[3])
    return [Launch("product" if flops else name, moved, flops)]


def operands(func: Any, args: tuple, kwargs: dict, result: Any) -> tuple[list, list]:
    """Tensors read and tensors written; those that are both stand in both."""
    read, written = [], []
    name = func._overloadpacket.__name__
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        written += tensors * writes
        if not (writes and (argument.is_out or name in ("copy_", "fill_", "zero_"))):
            read += tensors
    if not written:
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        shared = {x.untyped_storage()._cdata for x in read}
        written = [x for x in results if x.untyped_storage()._cdata not in shared]
    return read, written


def kernel_launch(kernel: Any, args: tuple, grid: tuple[int, ...], named: dict) -> Launch:
    bound = tools()[1].bound(kernel.__name__, kernel, args, named)
    a = bound.arguments
    if kernel.__name__ in TRAFFIC:
        moved = TRAFFIC[kernel.__name__](a, grid)
    else:
        moved = sum(size(x) for x in a.values() if isinstance(x, Tensor))
    name, flops = kernel.__name__.removesuffix("_kernel"), 0.0
    if name.startswith("anchored_fwd"):
        name += " alone" * (a["partial_ptr"] is None)  # without sums: the log-sum-exp is known
        flops = 2.0 * a["n"] * a["vocab"] * a["H"]
    return Launch(name, moved, flops, bound, grid)


def fused_launch(work: dict[str, Any]) -> Launch:
    """Of what fastpo._C.AnchoredTile is given."""
    n, v, h, sums, stored = (work[name] for name in ("n", "v", "h", "sums", "e_stride"))
    overlaps = work["pingpong"]
    words = cutlass.block_words(overlaps)
    fused = Fused(n, v, h, sums, stored > 0, words, work["swizzle"], overlaps)
    moved = 2 * (n + v) * h + 8 * n + 4 * sums * -(-v // words) * n + 2 * n * v * fused.stored
    name = "cutlass, one group multiplies" if overlaps else "cutlass, both groups multiply"
    return Launch(name, moved, 2.0 * n * v * h, fused)


def launches_of(
    tokens: int, hidden: int, vocab: int, case: Case, backend: str
) -> tuple[planner.Plan, list[Launch]]:
    gpu, *_ = tools()
    found: list[Launch] = []

    @contextmanager
    def watched() -> Iterator[None]:
        with gpu.without_values(), Launches(found):
            yield

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append(kernel_launch(self, args, grid, named))

    triton.runtime.JITFunction.run = run
    fastpo._C.AnchoredTile = lambda **named: named  # type: ignore[attr-defined]
    fastpo._C.anchored_cuda = lambda work, *_: found.append(fused_launch(work))  # type: ignore[attr-defined]
    if backend in SCHEDULES:
        schedule, backend = SCHEDULES[backend], "cutlass"
        cutlass.schedule = lambda: schedule
    linear_logps = fastpo.linear_logps  # imports the operators
    gpu.run_operators(watched)
    empty, bf16 = partial(torch.empty, device="cuda"), torch.bfloat16
    with gpu.without_values():
        x = empty(tokens, hidden, dtype=bf16, requires_grad=case.trains[0])
        w = empty(vocab, hidden, dtype=bf16, requires_grad=case.trains[1])
        labels, grad = empty(tokens, dtype=torch.int64), empty(tokens)
        plan = planner.plan(
            tokens, vocab, hidden, device="cuda", train_hidden=case.trains[0],
            train_head=case.trains[1], budget=case.budget, backend=backend,
        )  # fmt: skip
    with watched():
        given = {"outputs": case.outputs, "budget": case.budget, "backend": backend}
        logps = linear_logps(x, w, labels, **given).logps
        if any(case.trains):
            torch.autograd.grad(logps, [t for t in (x, w) if t.requires_grad], grad)
    return plan, found


# Small ones have no work to speak of.
KERNELS = {
    "anchored_fwd_tma": "epilogue of the anchored product",
    "anchored_fwd_tma alone": "the same beside a known log-sum-exp",
    "cutlass, one group multiplies": "the same on CUTLASS, ping-pong",
    "cutlass, both groups multiply": "the same on CUTLASS, cooperative",
    "rows_fwd": "forward rows",
    "rows_bwd": "backward rows",
}


def work_of(launch: Launch) -> tuple[float, float]:
    """Instructions and exponentials of all warps; of an anchored product its epilogue's."""
    paths, warps = executed(launch), 0
    if launch.kernel is not None:
        fused = isinstance(launch.kernel, Fused)
        warps = launch.kernel.warps if fused else launch.kernel.options["num_warps"]
    issued = sum(len(path) * times for path, times in paths)
    powers = sum(sum("MUFU.EX2" in line for line in path) * times for path, times in paths)
    return warps * issued, warps * powers


def working(launch: Launch) -> float:
    """Milliseconds."""
    instructions, exponentials = work_of(launch)
    issued = instructions / ASSUMED["instructions of a warp a clock of one"]
    return max(issued, 32 * exponentials / ASSUMED["exponentials a clock of one"]) / CLOCKS


def executed(launch: Launch) -> list[tuple[list[str], float]]:
    """Instructions of a thread, and how often all programs together run them."""
    if launch.name not in KERNELS:
        return []
    (code, _), sass = compiled(launch), tools()[3]
    if isinstance(launch.kernel, Fused):
        return [(launch.kernel.epilogue, launch.kernel.blocks)]
    a = launch.kernel.arguments
    if launch.flops:
        blocks = -(-a["n"] // a["BLOCK_M"]) * -(-a["vocab"] // a["BLOCK_V"])
        return [(sass.epilogue(code), blocks)]
    if launch.name == "rows_bwd":
        path = [text for _, text in sass.instructions(code) if text != "NOP"]
        return [(path, launch.grid[0] * launch.grid[1])]
    # One loop for the sums, one for what is kept.
    steps = (-(-a["width"] // block) for block in (a["BLOCK_V"], a["BLOCK_V"] // 2))
    return [(path, launch.grid[0] * n) for path, n in zip(sass.loops(code), steps, strict=False)]


_COMPILED: dict[tuple, tuple[str, dict]] = {}


def compiled(launch: Launch) -> tuple[str, dict[str, int]]:
    """Machine code for sm_90, and what it takes."""
    _, aot, _, sass = tools()
    if isinstance(launch.kernel, Fused):
        return launch.kernel.compiled
    source = aot.source_of(launch.kernel)
    key = (launch.name, str(source.signature), str(source.constants), str(source.attrs))
    if key not in _COMPILED:
        target = aot.GPUTarget("cuda", 90, 32)
        code = sass.disassembled(triton.compile(source, target, launch.kernel.options).asm["cubin"])
        _COMPILED[key] = code, sass.resources(code)
    return _COMPILED[key]


def milliseconds(launch: Launch) -> float:
    """Memory beside all else; of an anchored product the epilogue behind the main loop."""
    if isinstance(launch.kernel, Fused):
        busy = launch.kernel.clocks / (ASSUMED["GHz"] * 1e6)
    else:
        ours = 1.0 if launch.kernel is None else ASSUMED["of that by a main loop of ours"]
        busy = launch.flops / (FLOPS * ours) + working(launch)
    moving = launch.bytes / (ASSUMED["TB/s"] * ASSUMED["of it attained"] * 1e9)
    return max(busy, moving) + ASSUMED["µs between launches"] / 1e3


def row(hidden: int, vocab: int, case: str, backend: str) -> dict[str, Any]:
    plan, found = launches_of(TOKENS, hidden, vocab, CASES[case], backend)
    product = 2.0 * TOKENS * hidden * vocab
    products = sum(x.flops for x in found) / product
    assert abs(products - plan.products) < 1e-6, f"plan: {plan.products}, launched: {products}"
    bare = CASES[case].floor * product / FLOPS
    took = sum(map(milliseconds, found))
    return {
        "hidden": hidden,
        "vocab": vocab,
        "case": case,
        "backend": backend,
        "mode": plan.mode,
        "products": plan.products,
        "launches": len(found),
        "gigabytes": sum(x.bytes for x in found) / 1e9,
        "kept_gigabytes": plan.kept_bytes / 1e9,
        "workspace_gigabytes": plan.workspace_bytes / 1e9,
        "epilogues_and_rows_ms": sum(map(working, found)),
        "bare_ms": bare,
        "ms": took,
        "ratio": took / bare,
        # Of the first launch of each: the last is of fewer words.
        "kernels": {x.name: counts(x) for x in reversed(found) if executed(x)},
    }


def counts(launch: Launch) -> dict[str, float]:
    instructions, exponentials = work_of(launch)
    if isinstance(launch.kernel, Fused):
        cells = launch.kernel.cells
    else:
        a = launch.kernel.arguments
        cells = a["n"] * a["vocab"] if launch.flops else launch.grid[0] * a["width"]
    return {
        "instructions_per_cell": 32 * instructions / cells,
        "exponentials_per_cell": 32 * exponentials / cells,
        "registers": compiled(launch)[1]["reg"],
        "spilled_bytes": compiled(launch)[1]["stack"] + compiled(launch)[1]["local"],
    }


def predict() -> dict[str, Any]:
    rows = [row(*head, case, backend) for head in HEADS for case in CASES for backend in BACKENDS]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"what": "predicted", "gpu": "H100 SXM", "tokens": TOKENS, "dtype": "bfloat16",
            "versions": versions, "assumed": ASSUMED, "rows": rows}  # fmt: skip


def tables(predicted: dict[str, Any]) -> str:
    """For the block of docs/kernels.md."""
    rows = predicted["rows"]
    lines = [
        f"Time of a call over that of its bare products, N {predicted['tokens']:,}, "
        f"{predicted['dtype']}, {predicted['gpu']}. **Predicted, not measured**:",
        *("", *_by_head(rows, "{bare_ms:.1f} ms", "{ratio:.2f}"), ""),
        "Launches of a call, and what they read and write, each operand once:",
        *("", *_by_head(rows, "", "{launches}, {gigabytes:.1f} GB"), ""),
        "Instructions a cell of the logits in the machine code for sm_90, and registers a thread:",
        *("", *_kernels(rows), ""),
        "Assumed: " + ", ".join(f"{x:,} {name}" for name, x in predicted["assumed"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _by_head(rows: list[dict[str, Any]], of_case: str, of_row: str) -> Iterator[str]:
    heads = {x["hidden"]: x["vocab"] for x in rows}
    yield line("", *(f"H {hidden:,}, V {vocab:,}" for hidden, vocab in heads.items()))
    yield line(*["---"] * (1 + len(heads)))
    for case in CASES:
        those = [x for x in rows if x["case"] == case]
        shown = (of_case.format(**x) for x in those if x["backend"] == "triton")
        yield line(f"**{CASES[case].name}**", *shown)
        for backend, name in BACKENDS.items():
            yield line(name, *(of_row.format(**x) for x in those if x["backend"] == backend))


def _kernels(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Of the first head: the others' kernels are the same code."""
    cases = ("score", "statistics", "keep", "lean")
    yield line("", *(CASES[case].name for case in cases))
    yield line(*["---"] * (1 + len(cases)))
    for kernel, name in KERNELS.items():
        found = {x["case"]: x["kernels"][kernel] for x in reversed(rows) if kernel in x["kernels"]}
        shown = (found.get(case) for case in cases)
        cells = (x and f"{x['instructions_per_cell']:.1f}, {x['registers']}" for x in shown)
        yield line(name, *(x or "" for x in cells))


def line(*cells: str) -> str:
    return "|" + "".join(f" {x} |" if x else " |" for x in cells)


def main() -> None:
    predicted = predict()
    report.write(predicted, ROOT / RESULT)
    new = BLOCK.sub(lambda _: tables(predicted), PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the products of a head cost by themselves on this machine: the ceilings of all figures.

Whole products where the head has whole ones, tiles where it has tiles, each with the dtype it
accumulates in. The JSON is written after each.

    python benchmarks/gpu_ceilings.py --out facts.json
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.bench import machine, report
from fastpo.ops.rows import registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, TILE = {"cuda": (8192, 8192), "cpu": (16, 32)}[DEVICE]
# hidden, vocabulary
HEADS = {"cuda": ((896, 151_936), (2048, 128_256), (4096, 128_256)), "cpu": ((8, 100),)}[DEVICE]
COPY = {"cuda": 2**31, "cpu": 2**20}[DEVICE]  # bytes
PACKAGES = ("trl", "datasets", "peft", "liger_kernel", "cut_cross_entropy", "pytest", "xdist")

Product = tuple[str, float, Callable[[], Any]]  # name, FLOPs, call


def products(hidden: int, vocab: int) -> Iterator[Product]:
    """x [N, H], w [V, H], a tile of probabilities [N, TILE]; bf16, on a CPU float32."""
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    wide = {"out_dtype": torch.float32} if DEVICE == "cuda" else {}
    g = torch.Generator(DEVICE).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE).to(kind)

    x, w, p = drawn(TOKENS, hidden), drawn(vocab, hidden), drawn(TOKENS, TILE)
    words, whole = w[:TILE], 2.0 * TOKENS * hidden * vocab
    tile = whole / vocab * len(words)
    logits = torch.empty(TOKENS, vocab, dtype=kind, device=DEVICE)
    yield "logits", whole, partial(torch.mm, x, w.t(), out=logits)
    yield "d hidden, one product over V", whole, partial(torch.mm, logits, w)
    yield "d weight, all words", whole, partial(torch.mm, logits.t(), x)
    p = p[:, : len(words)]
    raw = torch.empty(TOKENS, len(words), device=DEVICE)
    total = torch.zeros(TOKENS, hidden, device=DEVICE)
    yield "tile of logits, float32", tile, partial(torch.mm, x, words.t(), out=raw, **wide)
    add = partial(torch.addmm, total, p, words, out=total, **wide)
    yield "tile into d hidden, float32", tile, add
    yield "tile of d weight", tile, partial(torch.mm, p.t(), x)
    if DEVICE == "cuda":
        yield "tile of d weight, no bf16 reductions", tile, partial(_exactly, torch.mm, p.t(), x)
        one = total[:1]
        add = partial(torch.addmm, one, p[:1], words, out=one, **wide)
        yield "tile into d hidden of one row, float32", tile / TOKENS, add


def _exactly(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """Without split-K sums in bf16, which PyTorch allows itself."""
    allowed = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        return function(*operands)
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed


def timed(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    watch = machine.stopwatch(DEVICE)
    watch(call)
    runs = [watch(call)[0].ms for _ in range(repeats)]
    return {"median_ms": statistics.median(runs), "min_ms": min(runs)}


def rows(repeats: int) -> Iterator[dict[str, Any]]:
    source = torch.zeros(COPY, dtype=torch.uint8, device=DEVICE)
    found = timed(partial(torch.empty_like(source).copy_, source), repeats)
    yield {"what": "copy", **found, "gb_per_s": 2 * COPY / found["median_ms"] / 1e6}
    del source
    for hidden, vocab in HEADS:
        sizes = {"tokens": TOKENS, "hidden": hidden, "vocab": vocab}
        for name, flops, call in products(hidden, vocab):
            try:
                found = timed(call, repeats)
            except RuntimeError as error:  # the library has no such product: the others are asked
                yield {"what": name, **sizes, "refused": str(error).splitlines()[0]}
                continue
            rate = flops / found["median_ms"] / 1e9
            yield {"what": name, **sizes, **found, "tflop_per_s": rate}


def there() -> dict[str, str]:
    """Backends and packages, and why one is not there."""
    device = torch.device(DEVICE)
    found = {name: registry.unavailable(name, device) or "there" for name in registry.BACKENDS}
    for name in PACKAGES:
        found[name] = "there" if importlib.util.find_spec(name) else "missing"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="turns; default: 20")
    options = parser.parse_args()
    made: dict[str, Any] = machine.facts(DEVICE) | {"what": "ceilings", "there": there()}
    for name in ("device", "versions", "there"):
        print(name, made[name], flush=True)
    made["rows"] = []
    for row in rows(options.repeats):
        print(*(f"{x:.4g}" if isinstance(x, float) else x for x in row.values()), flush=True)
        made["rows"].append(row)
        if options.out is not None:
            report.write(made, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

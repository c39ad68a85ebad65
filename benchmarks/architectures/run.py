"""Which causal models of transformers fastpo reads: lazy logits, `attach` and shared prompts.

    python benchmarks/architectures/run.py --out benchmarks/results/architectures.json

A tiny model of each type, loss and gradients in float32 beside those of the model's own logits.
Every type has a process of its own: what takes too long, or too much memory, is no model of all.
"""

from __future__ import annotations

import argparse
import logging
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor

import fastpo
from fastpo.bench import machine
from fastpo.bench.process import Died, fresh
from fastpo.bench.report import write

PATIENCE = 120  # seconds
MEMORY = 8 << 30  # bytes
CLOSE = 1e-4  # of the largest gradient
Loss = Callable[[], Tensor]
Row = dict[str, Any]


def compare(kind: str) -> Row:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.alarm(PATIENCE)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        model, batch = tiny.build(kind), rows()
        own = gradients(model, lambda: loss(model(**batch, use_cache=False).logits, batch))
    except Exception as error:  # of a model that nobody made: whatever its code says
        return {"type": kind, "model": said(error)}
    found = [of(model, batch, own) for of in (lazily, attached, shared)]
    names = ("lazy", "attach", "shared")
    largest = max((x for x in found if isinstance(x, float)), default=0.0)
    told = {name: verdict(x) for name, x in zip(names, found, strict=True)}
    return {"type": kind, "model": "built", **told, "largest": largest}


def verdict(found: float | str) -> str:
    if isinstance(found, str):
        return found
    return "same" if found <= CLOSE else f"differs by {found:.1e}"


def rows() -> dict[str, Tensor]:
    """Two that share half of their tokens."""
    ids = torch.randint(5, tiny.WORDS, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[1, :12] = ids[0, :12]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    logps = logits[:, :-1].float().log_softmax(-1)
    return -logps.gather(-1, batch["input_ids"][:, 1:, None]).mean()


def gradients(model: Any, of: Loss) -> list[Tensor]:
    """The loss, then those of all parameters that have one."""
    value, trained = of(), [x for x in model.parameters() if x.requires_grad]
    found = torch.autograd.grad(value, trained, materialize_grads=True)
    return [value.detach(), *found]


def apart(found: list[Tensor], own: list[Tensor]) -> float:
    """The largest difference over the largest gradient; NaN is infinitely far."""
    most = max(float(x.abs().max()) for x in own[1:])
    off = max(float((a - b).abs().max()) for a, b in zip(found, own, strict=True))
    return off / most if off == off else float("inf")


def lazily(model: Any, batch: dict[str, Tensor], own: list[Tensor]) -> float | str:
    kinds = []

    def read() -> Tensor:
        logits = model(**batch, use_cache=False).logits
        kinds.append(type(logits).__name__)
        return loss(logits, batch)

    with messages() as told, fastpo.lazy_logits(model):
        found = apart(gradients(model, read), own)
    return found if kinds == ["LazyLogits"] else "; ".join(told) or "the model's own logits"


def attached(model: Any, batch: dict[str, Tensor], own: list[Tensor]) -> float | str:
    try:
        with fastpo.attach(model):
            labels = batch["input_ids"]
            read = lambda: model(**batch, labels=labels, use_cache=False).loss  # noqa: E731
            return apart(gradients(model, read), own)
    except (RuntimeError, ValueError) as error:
        return said(error)


def shared(model: Any, batch: dict[str, Tensor], own: list[Tensor]) -> float | str:
    try:
        with messages() as told, fastpo.shared_prompts(model, always=True) as handle:
            read = lambda: loss(model(**batch, use_cache=False).logits, batch)  # noqa: E731
            found = apart(gradients(model, read), own)
            fewer = handle.tokens.saved > 0
    except (RuntimeError, ValueError) as error:
        return said(error)
    if fewer or found > CLOSE:
        return found
    return "; ".join(told) or "nothing shared"


@contextmanager
def messages() -> Iterator[list[str]]:
    """What fastpo's log says, without who says it."""
    told: list[str] = []
    handler = logging.Handler()

    def emit(record: logging.LogRecord) -> None:
        told.append(record.getMessage().rpartition(": ")[2])

    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger("fastpo")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=tiny.TYPES, metavar="TYPE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    made = {
        "what": "architectures",
        "command": "python benchmarks/architectures/run.py",
        **machine.facts("cpu"),
        "threads": 1,
        "rows": [],
    }
    for kind in options.types:
        try:
            row = fresh(compare, kind)
        except Died as died:
            row = {"type": kind, "model": f"its process ended with code {died.code}"}
        made["rows"].append(row)
        print(row, flush=True)
        write(made, options.out)


if __name__ == "__main__":
    main()

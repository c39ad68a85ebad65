"""What log-probabilities over a few words of each token cost: one by one, in tiles, over all words.

    python benchmarks/supports.py --out benchmarks/results/cpu_epyc_supports.json

Forward and backward of the head on one thread, timed by the processor, in processes of their own;
both ways are compared first, on fewer tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo import planner
from fastpo.bench import machine
from fastpo.bench.process import fresh
from fastpo.bench.report import write

V, H = 151_936, 896
WORDS = (1, 8, 20, 64, 256, 1024, 4096)
WAYS = {"few_s": V, "many_s": 0}  # how many words are few


def problem(tokens: int, words: int, trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, H, generator=g).requires_grad_()
    weight = (0.02 * torch.randn(V, H, generator=g)).requires_grad_(trained)
    ids = torch.randint(0, V, (tokens, words), generator=g)
    return hidden, weight, ids[:, 0].clone(), ids


def run(way: str, drawn: tuple[Tensor, ...]) -> list[Tensor]:
    hidden, weight, labels, ids = drawn
    support = None if way == "plain_s" else ids
    planner.gathered_words = lambda vocab, device: WAYS.get(way, 0)
    logps = fastpo.linear_logps(hidden, weight, labels, support=support).logps
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    return [logps.detach(), *torch.autograd.grad(logps.sum(), leaves)]


def check(words: int, trained: bool) -> None:
    found = (run(way, problem(24, words, trained)) for way in WAYS)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def cost(way: str, tokens: int, words: int, trained: bool) -> float:
    torch.set_num_threads(1)
    run(way, problem(16, words, trained))
    drawn = problem(tokens, words, trained)
    begin = time.process_time()
    run(way, drawn)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="in a batch (1024)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    made: dict[str, Any] = {
        "what": "supports",
        "command": f"python benchmarks/supports.py --tokens {options.tokens}",
        **machine.facts("cpu"),
        "shape": {"tokens": options.tokens, "vocab": V, "hidden": H, "dtype": "float32"},
        "threads": 1,
        "rows": [],
    }
    for trained in (True, False):
        plain = fresh(cost, "plain_s", options.tokens, 1, trained)
        for words in WORDS:
            fresh(check, words, trained)
            row = {"words": words, "trained": trained, "plain_s": plain}
            row |= {way: fresh(cost, way, options.tokens, words, trained) for way in WAYS}
            made["rows"].append(row)
            print(row, flush=True)
            write(made, options.out)


if __name__ == "__main__":
    main()

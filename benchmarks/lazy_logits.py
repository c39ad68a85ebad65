"""What reading `model(...).logits` costs, with the model's own logits and with lazy ones.

    python benchmarks/lazy_logits.py --out benchmarks/results/cpu_amd_epyc_lazy_logits.json

The head alone, forward and backward, of N tokens; every reading in a process of its own, on one
thread, timed by the processor. Memory is the growth of the peak over the inputs, less gradients.
Losses and gradients are compared first, on fewer tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpo.bench import machine
from fastpo.bench.process import fresh
from fastpo.bench.report import write
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise

V, H = 151_936, 896
Reading = Callable[[Tensor, Tensor], Tensor]


def entropy(x: Tensor) -> Tensor:
    logps = x.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def kl(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="sum", log_target=True)


def one_hot(x: Tensor, y: Tensor) -> Tensor:
    return -(F.one_hot(y, x.shape[-1]) * x.log_softmax(-1)).sum()


def jensen_shannon(x: Tensor, y: Tensor) -> Tensor:
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    mean = (0.5 * (p.exp() + q.exp())).log()
    return 0.5 * ((p.exp() * (p - mean)).sum(-1) + (q.exp() * (q - mean)).sum(-1))


def generalised(x: Tensor, y: Tensor) -> Tensor:
    """As TRL's GKD."""
    s, t = x.log_softmax(-1), y.log_softmax(-1)
    mean = torch.logsumexp(torch.stack([s + math.log(0.5), t + math.log(0.5)]), dim=0)
    teacher, student = (F.kl_div(mean, z, reduction="none", log_target=True) for z in (t, s))
    return 0.5 * teacher + 0.5 * student


# Of logits [N, V] and labels [N].
READINGS: dict[str, Reading] = {
    "cross-entropy": lambda x, y: F.cross_entropy(x, y),
    "log-softmax, gather": lambda x, y: x.log_softmax(-1).gather(-1, y[:, None]).sum(),
    "and entropy": lambda x, y: F.cross_entropy(x, y) - 0.01 * entropy(x).mean(),
    "one-hot labels by hand": one_hot,
    "KL of two models": lambda x, y: kl(x, 0.5 * x.detach()),
    "Jensen-Shannon as GKD": lambda x, y: generalised(x, 0.5 * x.detach()).sum(),
    "Jensen-Shannon by hand": lambda x, y: jensen_shannon(x, 0.5 * x.detach()).sum(),
    "all logits": lambda x, y: x.cumsum(-1)[:, -1].sum(),
}


class Drawn(NamedTuple):
    head: nn.Linear
    hidden: Tensor  # [N, H]
    labels: Tensor  # [N]


def draw(tokens: int) -> Drawn:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False)
    hidden = torch.randn(tokens, H, requires_grad=True)
    return Drawn(head, hidden, torch.randint(0, V, (tokens,)))


def read(name: str, lazy: bool, drawn: Drawn) -> tuple[Tensor, ...]:
    """The loss, d hidden, d weight."""
    head, hidden, labels = drawn
    logits = promised(Promise.of(head, hidden)) if lazy else head(hidden)
    loss = READINGS[name](logits, labels)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight))


def check(name: str) -> None:
    found = (read(name, lazy, draw(40)) for lazy in (True, False))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def cost(name: str, lazy: bool, tokens: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    read(name, lazy, draw(16))
    drawn = draw(tokens)
    owed = (drawn.hidden.nbytes + drawn.head.weight.nbytes) / 2**20
    peak, begin = machine.Peak("cpu"), time.process_time()
    read(name, lazy, drawn)
    seconds = time.process_time() - begin
    how = "lazy" if lazy else "own"
    return {"reading": name, "logits": how, "cpu_s": seconds, "extra_mib": peak.mib() - owed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="in a batch (2048)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    made = {
        "what": "lazy logits",
        "command": f"python benchmarks/lazy_logits.py --tokens {options.tokens}",
        **machine.facts("cpu"),
        "shape": {"tokens": options.tokens, "vocab": V, "hidden": H, "dtype": "float32"},
        "threads": 1,
        "rows": [],
    }
    for name in READINGS:
        fresh(check, name)
        for lazy in (False, True):
            made["rows"].append(fresh(cost, name, lazy, options.tokens))
            print(made["rows"][-1], flush=True)
            write(made, options.out)


if __name__ == "__main__":
    main()

"""Peak extra memory of the primitives against the form that materialises the logits.

Every variant is checked against float64 first, then runs alone in a fresh process: the growth of
the peak over the inputs, less gradients. One tensor of logits is `logits MiB`; a tile 8 MiB on a
CPU. On a CPU the growth is that of the resident set, on a GPU that of the allocator.

    python benchmarks/bench_memory.py --out benchmarks/results/cpu_epyc_memory_primitives.json
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastpo
from fastpo import reference
from fastpo.bench import machine
from fastpo.testing import HeadInputs, make_head

K = 20
MIXING = (0.7, 0.3)
CHECKED_ROWS = 8
Step = Callable[[list[HeadInputs], int | None], Tensor]
Truth = Callable[[list[HeadInputs]], Tensor]


def logits(x: HeadInputs) -> Tensor:
    return x.hidden @ x.weight.t()


def fused_logps(heads: list[HeadInputs], budget: int | None) -> Tensor:
    x = heads[0]
    found = fastpo.linear_logps(x.hidden, x.weight, x.labels, budget=budget).logps
    assert found is not None
    return found


def eager_logps(heads: list[HeadInputs], budget: int | None) -> Tensor:
    log_p = torch.log_softmax(logits(heads[0]).float(), -1)
    return log_p.gather(1, heads[0].labels.unsqueeze(1)).squeeze(1)


def fused_topk(heads: list[HeadInputs], budget: int | None) -> Tensor:
    x = heads[0]
    return fastpo.linear_topk(x.hidden, x.weight, K, budget=budget).values


def eager_topk(heads: list[HeadInputs], budget: int | None) -> Tensor:
    return torch.log_softmax(logits(heads[0]).float(), -1).topk(K).values


def fused_mixture(heads: list[HeadInputs], budget: int | None) -> Tensor:
    hiddens, weights = [x.hidden for x in heads], [x.weight for x in heads]
    found = fastpo.mixed_linear_logps(hiddens, weights, MIXING, heads[0].labels).logps
    assert found is not None
    return found


def eager_mixture(heads: list[HeadInputs], budget: int | None) -> Tensor:
    mixture = MIXING[0] * logits(heads[0]).float() + MIXING[1] * logits(heads[1]).float()
    return torch.log_softmax(mixture, -1).gather(1, heads[0].labels.unsqueeze(1)).squeeze(1)


def true_logps(heads: list[HeadInputs]) -> Tensor:
    x = heads[0]
    found = reference.linear_logps(x.hidden, x.weight, x.labels).logps
    assert found is not None
    return found


def true_topk(heads: list[HeadInputs]) -> Tensor:
    return reference.linear_topk(heads[0].hidden, heads[0].weight, K).values


def true_mixture(heads: list[HeadInputs]) -> Tensor:
    hiddens, weights = [x.hidden for x in heads], [x.weight for x in heads]
    m = torch.tensor(MIXING, dtype=torch.float64, device=hiddens[0].device)
    found = reference.mixed_linear_logps(hiddens, weights, m, heads[0].labels).logps
    assert found is not None
    return found


def fused_divergence(kind: str, heads: list[HeadInputs], budget: int | None) -> Tensor:
    x, teacher = heads
    found = fastpo.linear_divergence(
        x.hidden, x.weight, teacher.hidden, teacher.weight, kind=kind, budget=budget
    ).divergence
    assert found is not None
    return found


def eager_divergence(kind: str, heads: list[HeadInputs], budget: int | None) -> Tensor:
    s, t = (torch.log_softmax(logits(x).float(), -1) for x in heads)
    if kind == "forward_kl":
        return (t.exp() * (t - s)).sum(-1)
    m = torch.logaddexp(s, t) - math.log(2)
    return 0.5 * (t.exp() * (t - m) + s.exp() * (s - m)).sum(-1)


def true_divergence(kind: str, heads: list[HeadInputs]) -> Tensor:
    x, teacher = heads
    found = reference.linear_divergence(
        x.hidden, x.weight, teacher.hidden, teacher.weight, kind=kind
    ).divergence
    assert found is not None
    return found


def divergence(kind: str) -> tuple[Step, Step, Truth, int]:
    return *(partial(f, kind) for f in (fused_divergence, eager_divergence, true_divergence)), 2


# name -> (fused, materialised, truth, heads)
PRIMITIVES: dict[str, tuple[Step, Step, Truth, int]] = {
    "linear_logps": (fused_logps, eager_logps, true_logps, 1),
    "linear_topk": (fused_topk, eager_topk, true_topk, 1),
    "mixed_linear_logps": (fused_mixture, eager_mixture, true_mixture, 2),
    "forward_kl": divergence("forward_kl"),
    "jsd": divergence("jsd"),
}
# name -> (d hidden?, d weight?, budget); of two heads only the first is trained
MODES: dict[str, tuple[bool, bool, int | None]] = {
    "score": (False, False, None),
    "frozen": (True, False, None),
    "trainable": (True, True, None),
    "lean": (True, True, 0),
}


def step(variant: str, heads: list[HeadInputs]) -> Tensor:
    """One forward and, where the mode has one, its backward; variant: primitive/form/mode."""
    primitive, form, mode = variant.split("/")
    hidden_grad, weight_grad, budget = MODES[mode]
    fused, materialised, *_ = PRIMITIVES[primitive]
    function = fused if form == "fused" else materialised
    heads[0].hidden.requires_grad_(hidden_grad)
    heads[0].weight.requires_grad_(weight_grad)
    result = function(heads, budget)
    leaves = list(heads[0].leaves().values())
    if leaves:
        torch.autograd.grad((result * -0.01).sum(), leaves)
    return result.detach()


def variants() -> list[str]:
    """The materialised form has no budget; the fused mixture keeps nothing in any mode."""
    return [
        f"{primitive}/{form}/{mode}"
        for primitive in PRIMITIVES
        for mode in MODES
        for form in ("fused", "materialised")
        if mode != "lean" or (form == "fused" and primitive != "mixed_linear_logps")
    ]


def make(args: argparse.Namespace, tokens: int, vocab: int, heads: int) -> list[HeadInputs]:
    dtype = getattr(torch, args.dtype)
    return [
        make_head(tokens, vocab, args.hidden, dtype=dtype, device=args.device, seed=seed)
        for seed in range(heads)
    ]


def check(args: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Largest error of a log-probability against float64, on a few rows.

    Once for each form: a test holds all modes to the same bits.
    """
    errors = {}
    for primitive, form in dict.fromkeys(tuple(name.split("/")[:2]) for name in names):
        *_, truth_of, count = PRIMITIVES[primitive]
        heads = make(args, CHECKED_ROWS, args.vocab, count)
        truth = truth_of([x.like(torch.float64, grad=False) for x in heads])
        found = step(f"{primitive}/{form}/score", heads)
        errors[f"{primitive}/{form}"] = (found.double() - truth).abs().max().item()
        right = bool(((found - truth).abs() <= 2e-4 * (1 + truth.abs())).all())
        if form == "fused" and not right:
            raise SystemExit(
                f"{primitive}: wrong by {(found - truth).abs().max():.2e} nats; nothing is measured"
            )
    return errors


def measure(name: str, args: argparse.Namespace) -> float:
    """MiB above inputs and gradients at the worst moment of one step."""
    primitive, _, mode = name.split("/")
    count = PRIMITIVES[primitive][3]
    step(name, make(args, 4, 512, count))
    heads = make(args, args.tokens, args.vocab, count)
    hidden_grad, weight_grad, _ = MODES[mode]
    owed = heads[0].hidden.nbytes * hidden_grad + heads[0].weight.nbytes * weight_grad
    peak = machine.Peak(args.device)
    step(name, heads)
    return peak.mib() - owed / 2**20


def in_fresh_process(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--device", args.device]
    command += ["--dtype", args.dtype, "--tokens", str(args.tokens)]
    command += ["--vocab", str(args.vocab), "--hidden", str(args.hidden)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="only compare with float64")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.memory_of:
        print(measure(args.memory_of, args))
        return
    names = variants()
    errors = check(args, names)
    if args.check:
        print("\n".join(f"{name:<40}{error:.2e}" for name, error in errors.items()))
        return
    size = {"dtype": args.dtype, "N": args.tokens, "V": args.vocab, "H": args.hidden, "k": K}
    whole = 4 * args.tokens * args.vocab / 2**20
    report = machine.facts(args.device) | size | {"what": "primitives", "logits_mib": whole}
    report["rows"] = rows = []
    print(f"{report['device']}, {size}; float32 logits: {whole:.0f} MiB")
    print(f"{'variant':<42}{'extra MiB':>10}{'max error':>11}")
    for name in names:
        primitive, form, mode = name.split("/")
        extra, error = in_fresh_process(name, args), errors[f"{primitive}/{form}"]
        print(f"{name:<42}{extra:>10.0f}{error:>11.1e}", flush=True)
        row = {"primitive": primitive, "form": form, "mode": mode}
        rows.append(row | {"extra_mib": extra, "max_error": error})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a head's rounding does to a trained model: SmolLM2-135M-Instruct of `make demo-real`.

`errors`: log-probabilities of the embedded held-out pairs against float64, from the hidden states
and the head that the model has in float32 and in bfloat16; the truth is of the same numbers.
`drift`: losses of DPO on the shortest embedded pairs, one a step, whole model, AdamW; in bfloat16
(TRL's `bf16=True`: autocast) against TRL's own in float32.
`step`: time and memory of such a step, 2 pairs x 512 tokens of a file that has so long ones, in
float32 on one thread.

    python benchmarks/real_model.py --data pairs_en.jsonl \
        --out benchmarks/results/cpu_epyc_real_model.json

Every run has a process of its own, and the file grows by each; those that it has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fastpo
from fastpo.bench import machine
from fastpo.bench.process import fresh
from fastpo.bench.report import write
from fastpo.bench.rivals import rival_variants
from fastpo.bench.variants import eager
from fastpo.demo import smollm2
from fastpo.demo.data import Row, embedded_pairs, read_rows
from fastpo.testing import HeadInputs

DTYPES = ("float32", "bfloat16")
HEADS = ("fastpo", "trl")
TEXTS = 24
PAIRS, LENGTH, STEPS = 2, 512, 2  # of a step, and how many are timed after the first
Report = dict[str, Any]


@cache
def folder() -> str:
    return str(smollm2.converted(print))


@torch.no_grad()
def head_inputs(dtype: torch.dtype) -> HeadInputs:
    """What the model hands to its head over whole conversations, and the words that come next."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    model: Any = AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype)
    hidden, labels = [], []
    for row in embedded_pairs().held_out[:TEXTS]:
        said = row["prompt"] + row["chosen"]
        ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)
        hidden.append(model.model(**ids).last_hidden_state[0, :-1])
        labels.append(ids["input_ids"][0, 1:])
    return HeadInputs(torch.cat(hidden), model.lm_head.weight.detach(), torch.cat(labels))


def heads() -> dict[str, Any]:
    """Functions of HeadInputs that give log-probabilities."""

    def ours(x: HeadInputs) -> torch.Tensor | None:
        return fastpo.linear_logps(x.hidden, x.weight, x.labels).logps

    (trl,) = (v for v in rival_variants() if (v.name, v.case) == ("trl", "score"))
    theirs = trl.make()
    return {
        "fastpo": ours,
        "trl": lambda x: theirs(x).logps,
        "eager": lambda x: eager(x).logps,
    }


def truth(x: HeadInputs, block: int = 256) -> torch.Tensor:
    """All log-probabilities' label column, in float64; a block at a time, for its memory."""
    weight, found = x.weight.double().t(), []
    for hidden, labels in zip(x.hidden.split(block), x.labels.split(block), strict=True):
        log_p = (hidden.double() @ weight).log_softmax(-1)
        found.append(log_p.gather(1, labels.unsqueeze(1)).squeeze(1))
    return torch.cat(found)


@torch.no_grad()
def errors(dtype: str) -> list[Report]:
    """A row for each head: the largest and the mean error in nats."""
    x = head_inputs(getattr(torch, dtype))
    exact = truth(x)
    about = {
        "dtype": dtype,
        "tokens": len(exact),
        "mean_logp": exact.mean().item(),
        "share_over_half": (exact.exp() > 0.5).double().mean().item(),
    }
    rows = []
    for name, head in heads().items():
        error = (head(x).double() - exact).abs()
        rows.append(about | {"head": name, "max": error.max().item(), "mean": error.mean().item()})
    return rows


def drift(dtype: str, head: str, steps: int) -> Report:
    """One training's losses."""
    rows: list[Row] = sorted(embedded_pairs().train, key=lambda row: len(str(row)))[:steps]
    losses = trained(rows, head, max_steps=steps, bf16=dtype == "bfloat16")
    return {"dtype": dtype, "head": head, "losses": losses}


def step(head: str, data: Path) -> Report:
    """Seconds and memory of the steps after the first, and all losses."""
    torch.set_num_threads(1)
    rows, marks, peaks = long_rows(data), [], []

    def begin() -> None:
        peaks[:] = peaks or [machine.Peak("cpu")]
        marks.append((time.process_time(), time.perf_counter()))

    options = {"per_device_train_batch_size": PAIRS, "max_length": LENGTH}
    losses = trained(rows, head, begin, max_steps=STEPS + 1, bf16=False, **options)
    begin()
    cpu, wall = ([b - a for a, b in pairwise(x)][1:] for x in zip(*marks, strict=True))
    about = {"head": head, "data": data.name, "pairs": PAIRS, "length": LENGTH, "threads": 1}
    return about | {"cpu_s": cpu, "wall_s": wall, "extra_mib": peaks[0].mib(), "losses": losses}


def long_rows(data: Path) -> list[Row]:
    """Of the file's first that fill a row of LENGTH, at least half of it with an answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())

    def tokens(said: Any) -> int:
        return len(tokenizer.apply_chat_template(said, tokenize=True, return_dict=False))

    found = []
    for _, row in read_rows(data):
        answers = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
        if tokens(row["prompt"]) <= LENGTH // 2 and min(map(tokens, answers)) >= LENGTH:
            found.append(row)
    return found[: PAIRS * (STEPS + 1)]


def trained(
    rows: list[Row], head: str, begin: Callable[[], None] | None = None, **options: Any
) -> list[float]:
    """The losses of DPO on those; `begin` is called before each step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if begin is not None:
                begin()

    with tempfile.TemporaryDirectory() as scratch, patch(head):
        settings: dict[str, Any] = {
            "output_dir": scratch,
            "per_device_train_batch_size": 1,
            "learning_rate": 5e-6,
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = DPOTrainer(
            folder(),
            args=DPOConfig(**settings | options),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder()),
            callbacks=[Clock()],
        )
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def patch(head: str) -> Any:
    return fastpo.patched() if head == "fastpo" else nullcontext()


def summary(rows: list[Report]) -> list[Report]:
    """How far each training's losses are from those of TRL in float32."""
    base = next((r["losses"] for r in rows if (r["dtype"], r["head"]) == ("float32", "trl")), None)
    found = []
    for row in rows if base is not None else ():
        gaps = [abs(a - b) for a, b in zip(row["losses"], base, strict=True)]
        about = {"largest": max(gaps), "mean": sum(gaps) / len(gaps), "last": gaps[-1]}
        found.append({"dtype": row["dtype"], "head": row["head"], **about})
    return found


def missing(made: Report, data: Path | None) -> list[tuple[str, ...]]:
    """What the report lacks: a name of its, and what tells its rows apart."""
    there: set[tuple[str, ...]] = {("errors", row["dtype"]) for row in made["errors"]}
    there |= {("drift", row["dtype"], row["head"]) for row in made["drift"]}
    there |= {("steps", row["head"]) for row in made["steps"]}
    wanted: list[tuple[str, ...]] = [("errors", dtype) for dtype in DTYPES]
    wanted += [("drift", dtype, head) for dtype in DTYPES for head in HEADS]
    wanted += [("steps", head) for head in HEADS if data is not None]
    return [run for run in wanted if run not in there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of a training (50)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="pairs of the timed steps")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--runs", type=int, default=8, metavar="N", help="no more in this call (8)")
    options = parser.parse_args()
    command = f"python benchmarks/real_model.py --steps {options.steps}"
    command += f" --data {options.data.name}" if options.data else ""
    made: Report = {"what": "real model", "command": command, "model": "SmolLM2-135M-Instruct"}
    made |= machine.facts("cuda" if torch.cuda.is_available() else "cpu")
    made |= {"errors": [], "drift": [], "drift_from_float32": [], "steps": []}
    if options.out.exists():
        made |= json.loads(options.out.read_text(encoding="utf-8")) | {"command": command}
    folder()
    for kind, *run in missing(made, options.data)[: options.runs]:
        if kind == "errors":
            made["errors"] += fresh(errors, *run)
        elif kind == "drift":
            made["drift"].append(fresh(drift, *run, options.steps))
            made["drift_from_float32"] = summary(made["drift"])
        else:
            made["steps"].append(fresh(step, *run, options.data))
        write(made, options.out)
    for row in made["errors"] + made["drift_from_float32"] + made["steps"]:
        print(row)


if __name__ == "__main__":
    main()

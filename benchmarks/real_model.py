"""What a head's rounding does to a trained model: SmolLM2-135M-Instruct of `make demo-real`.

`errors`: log-probabilities of the embedded held-out pairs against float64, from the hidden states
and the head that the model has in float32 and in bfloat16; the truth is of the same numbers.
`drift`: losses of DPO on the shortest embedded pairs, one a step, whole model, AdamW; in bfloat16
(TRL's `bf16=True`: autocast) against TRL's own in float32.

    python benchmarks/real_model.py --out benchmarks/results/cpu_epyc_real_model.json

Every run has a process of its own, and the file grows by each; those that it has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from functools import cache
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
from fastpo.demo.data import Row, embedded_pairs
from fastpo.testing import HeadInputs

DTYPES = ("float32", "bfloat16")
HEADS = ("fastpo", "trl")
TEXTS = 24
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
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows: list[Row] = sorted(embedded_pairs().train, key=lambda row: len(str(row)))[:steps]
    with tempfile.TemporaryDirectory() as scratch, patch(head):
        settings: dict[str, Any] = {
            "output_dir": scratch,
            "max_steps": steps,
            "per_device_train_batch_size": 1,
            "learning_rate": 5e-6,
            "bf16": dtype == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = DPOTrainer(
            folder(),
            args=DPOConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder()),
        )
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"dtype": dtype, "head": head, "losses": losses}


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


def missing(made: Report) -> list[tuple[str, ...]]:
    """Arguments of `errors`, then of `drift`, that the report lacks."""
    there = {(row["dtype"],) for row in made["errors"]}
    there |= {(row["dtype"], row["head"]) for row in made["drift"]}
    wanted = [(dtype,) for dtype in DTYPES] + [(d, head) for d in DTYPES for head in HEADS]
    return [run for run in wanted if run not in there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of a training (50)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--runs", type=int, default=6, metavar="N", help="no more in this call (6)")
    options = parser.parse_args()
    command = f"python benchmarks/real_model.py --steps {options.steps}"
    made: Report = {"what": "real model", "command": command, "model": "SmolLM2-135M-Instruct"}
    made |= machine.facts("cuda" if torch.cuda.is_available() else "cpu")
    made |= {"errors": [], "drift": [], "drift_from_float32": []}
    if options.out.exists():
        made = json.loads(options.out.read_text(encoding="utf-8"))
    folder()
    for run in missing(made)[: options.runs]:
        if len(run) == 1:
            made["errors"] += fresh(errors, *run)
        else:
            made["drift"].append(fresh(drift, *run, options.steps))
            made["drift_from_float32"] = summary(made["drift"])
        write(made, options.out)
    for row in made["errors"] + made["drift_from_float32"]:
        print(row)


if __name__ == "__main__":
    main()

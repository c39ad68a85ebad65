"""How long a context and how large a batch fit, by `fastpo plan`, as one measure joins another.

    python benchmarks/plan_contexts.py [--out benchmarks/results/plan_contexts.json] [--runs N]

No GPU is needed and none is asked. What the file has is not computed again; the tables of
docs/longer-contexts.md are written from it.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch

from fastpo.bench import machine, readme
from fastpo.bench.report import grow
from fastpo.bench.step.architectures import ADAPTED, RANK, architecture
from fastpo.planning.cards import memory_of
from fastpo.planning.fits import Depths
from fastpo.planning.models import size_of
from fastpo.planning.setting import HEADS, Lora, Setting

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "plan_contexts.json"
PAGE = ROOT / "docs" / "longer-contexts.md"
CARDS = {"smollm2-135m": "4090", "qwen2.5-1.5b": "4090", "llama-3-8b-lora": "h100"}
CONTEXT = 2048  # of the rows of a batch
SHARED = "shared prompts, 1:1"
# Each joins those above it.
WAYS: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "checkpointing": {"checkpointing": "layers"},
    "offload": {"checkpointing": "offload"},
    "precomputed reference": {"reference": "precomputed"},
    SHARED: {"prompt_rows": 2},
}


def setting_of(model: str, way: str) -> Setting:
    options: dict[str, Any] = {}
    for name, joins in WAYS.items():
        options |= joins
        if name == way:
            break
    lora = Lora(RANK, ADAPTED) if architecture(model).lora else None
    memory = memory_of(CARDS[model])
    options |= {"context": CONTEXT, "attention": "flash", "lora": lora}
    return Setting(model, memory=memory, **options)


def row(model: str, way: str, head: str) -> dict[str, Any]:
    setting = setting_of(model, way)
    assert setting.memory is not None
    depths = Depths(setting, architecture(model).config, head)
    found = {what: depths.largest(what, setting.memory) for what in ("context", "batch")}
    sizes = {k: 0 if x is None else getattr(x.setting, k) for k, x in found.items()}
    print(model, way, head, sizes, flush=True)
    return {"model": model, "way": way, "head": head, **sizes}


def about(model: str) -> dict[str, Any]:
    setting = setting_of(model, "nothing else")
    weights = size_of(setting, architecture(model).config)
    return {
        "name": model,
        "card": CARDS[model],
        "memory": setting.memory,
        "weights": weights,
        "lora": setting.lora is not None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--runs", type=int, metavar="N", help="no more in this call")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = machine.facts("cpu") | {"what": "plan contexts", "batch_context": CONTEXT, "rows": []}
    report["models"] = [about(model) for model in CARDS]
    cases = itertools.product(CARDS, WAYS, HEADS)
    shared = (case for case in cases if case[1:] != (SHARED, "trl"))  # TRL alone shares none
    grow(report, options.out, shared, row, options.runs)
    if PAGE.exists():
        readme.rewrite(PAGE, write=True)


if __name__ == "__main__":
    main()

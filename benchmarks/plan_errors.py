"""How far `fastpo plan` is from what a step really holds, over small models of many kinds.

    python benchmarks/plan_errors.py [--out benchmarks/results/plan_errors.json]

Every case runs on this machine's CPU in float32, in a process of its own, one thread; those that
the file has are not repeated. The table in docs/planning.md is written from it.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as T

from fastpo.bench import machine, readme
from fastpo.bench.report import grow
from fastpo.planning.fits import Depths
from fastpo.planning.measure import measure
from fastpo.planning.setting import HEADS, Lora, Setting

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "plan_errors.json"
PAGE = ROOT / "docs" / "planning.md"
SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32_000,
}
KINDS: dict[str, Any] = {
    "llama": T.LlamaConfig(**SIZES),
    "qwen2, tied": T.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": T.Qwen3Config(**SIZES),
    "mistral": T.MistralConfig(**SIZES),
    "gemma2": T.Gemma2Config(**SIZES),
    "gemma3": T.Gemma3TextConfig(**SIZES),
    "phi3": T.Phi3Config(**SIZES, pad_token_id=0),
    "olmo2": T.Olmo2Config(**SIZES),
    "granite": T.GraniteConfig(**SIZES),
    "gpt2": T.GPT2Config(n_embd=384, n_layer=4, n_head=6, vocab_size=32_000),
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": Lora()},
    "checkpointing": {"checkpointing": "layers"},
    "GKD": {"trainer": "gkd"},
    "distillation": {"trainer": "distillation"},
}


def row(kind: str, way: str, head: str) -> dict[str, Any]:
    config = KINDS[kind]
    setting = Setting(kind, dtype="fp32", device="cpu", context=256, batch=2, **WAYS[way])
    told = Depths(setting, config, head).estimate().peak
    held = measure(setting, config, head)
    print(f"{kind} {way} {head}: {told / held - 1:+.1%}", flush=True)
    return {"model": kind, "way": way, "head": head, "told": told, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--runs", type=int, metavar="N", help="no more in this call")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = machine.facts("cpu") | {"what": "plan errors", "rows": []}
    grow(report, options.out, itertools.product(KINDS, WAYS, HEADS), row, options.runs)
    readme.rewrite(PAGE, write=True)


if __name__ == "__main__":
    main()

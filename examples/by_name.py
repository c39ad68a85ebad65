"""Train any objective of pairs, tokens, single responses or groups by its name.

    python examples/by_name.py simpo beta=2.0 gamma=1.0
    python examples/by_name.py kto --data pairs.jsonl --steps 30

The model is a small Qwen2 with random weights and a tokenizer trained on the data, so nothing is
downloaded. With your own checkpoint you do not need `small_model`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import fastpo
from fastpo import objectives
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objective", help="a key; `fastpo objectives` lists them")
    parser.add_argument("hyperparameters", nargs="*", help="name=value, value in JSON")
    parser.add_argument("--data", type=Path, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    pairs = (item.split("=", 1) for item in args.hyperparameters)
    hyperparameters = {name: json.loads(value) for name, value in pairs}
    rows = (
        [json.loads(line) for line in args.data.open(encoding="utf-8")]
        if args.data
        else embedded_pairs().train
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(args.objective, hyperparameters, rows, folder, args.steps)
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    fifth = max(len(losses) // 5, 1)
    first, last = (sum(part) / fifth for part in (losses[:fifth], losses[-fifth:]))
    print(f"{args.objective}: loss {first:.4f} in the first steps, {last:.4f} in the last")


def build(key: str, hyperparameters: dict, rows: list, folder: str, steps: int):
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)
    small_model(tokenizer).save_pretrained(f"{folder}/model")
    settings = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-4,
        "max_length": 256,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    common = {"model": f"{folder}/model", "processing_class": tokenizer}
    found = objectives.get(key)  # by an alias, too
    family = next(
        name for name, keys in objectives.families().items() if found in map(objectives.get, keys)
    )
    if family == "groups":
        data = Dataset.from_list([as_group(row) for row in rows])
        bound = objectives.get(key, **hyperparameters)
        config = DPOConfig(**settings)
        return fastpo.GroupTrainer(args=config, objective=bound, train_dataset=data, **common)
    fastpo.patch(objective=key, **hyperparameters)
    single = family == "singles"
    trainer, config = (KTOTrainer, KTOConfig) if single else (DPOTrainer, DPOConfig)
    # KTOTrainer splits the pairs itself.
    return trainer(args=config(**settings), train_dataset=Dataset.from_list(rows), **common)


def as_group(row: dict) -> dict:
    completions = [row["chosen"], row["rejected"]]
    return {"prompt": row["prompt"], "completions": completions, "scores": [1.0, 0.0]}


def small_model(tokenizer, hidden_size: int = 128) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    main()

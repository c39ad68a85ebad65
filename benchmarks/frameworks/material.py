"""A Qwen2 with random weights, its tokenizer, and pairs of texts; in an environment's own classes.

    PYTHONPATH=build/swift python benchmarks/frameworks/material.py FOLDER --words 151936 ...

FOLDER/model is a checkpoint, FOLDER/pairs.json a list of {prompt, chosen, rejected}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer

PAIRS = 12
_SPOKEN = 64  # more than what a template puts around a prompt and an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--words", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens of the longest row")
    args = parser.parse_args()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), min(4096, args.words))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(args.folder / "model")
    model(tokenizer, args.words, args.hidden).save_pretrained(args.folder / "model")
    found = json.dumps(pairs(tokenizer, rows, args.length), indent=1)
    (args.folder / "pairs.json").write_text(found)


def model(tokenizer: Any, words: int, hidden: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=words,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            initializer_range=0.2,  # by the default every loss is log V
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pairs(tokenizer: Any, rows: list[Any], length: int) -> list[dict[str, str]]:
    """No two texts are equally long, and the longest is about `length` tokens with its prompt."""

    def cut(side: str, start: int, tokens: int) -> str:
        text = " ".join(row[side][0]["content"] for row in rows[start : start + 40])
        return tokenizer.decode(tokenizer(text).input_ids[:tokens])

    asked = length // 8
    answered = length - asked - _SPOKEN
    return [
        {
            "prompt": cut("prompt", 7 * i, asked - i),
            "chosen": cut("chosen", 7 * i, answered - 5 * i % 7),
            "rejected": cut("rejected", 7 * i, answered - 3 * i % 11),
        }
        for i in range(PAIRS)
    ]


if __name__ == "__main__":
    main()

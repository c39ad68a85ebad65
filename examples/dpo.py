"""DPO with TRL, unchanged but for one line.

    python examples/dpo.py --steps 20

The model is a small Qwen2 with random weights and the pairs ship with fastpo, so nothing is
downloaded. With your own checkpoint and dataset only `DPOTrainer(...)` stays.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from by_name import small_model
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer

fastpo.patch()  # the line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    pairs = embedded_pairs()
    tokenizer = train_tokenizer(texts_of(pairs.train), 4096)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        small_model(tokenizer).save_pretrained(f"{folder}/model")
        trainer = DPOTrainer(
            model=f"{folder}/model",
            args=DPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                learning_rate=5e-4,
                logging_steps=1,
                use_cpu=True,
                bf16=False,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list(pairs.train),
            processing_class=tokenizer,
        )
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    print(f"dpo: loss {logs[0]['loss']:.4f} in the first step, {logs[-1]['loss']:.4f} in the last")


if __name__ == "__main__":
    main()

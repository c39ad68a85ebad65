"""transformers' own Trainer, without TRL: `fastpo.attach` takes the logits out of the model.

python examples/trainer.py --steps 20
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from by_name import small_model
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    talks = [row["prompt"] + row["chosen"] for row in rows]
    texts = tokenizer.apply_chat_template(talks, tokenize=False)
    torch.manual_seed(0)
    model = small_model(tokenizer)
    with tempfile.TemporaryDirectory() as folder, fastpo.attach(model):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"trainer: loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")


if __name__ == "__main__":
    main()

"""transformers' own Trainer, without TRL: with `fastpo.attach` the model returns no logits.

python examples/trainer.py --steps 20

Where the trainer reads logits itself, `fastpo.lazy_logits` avoids computing them:

python examples/trainer.py --steps 20 --smoothing 0.1
python examples/trainer.py --steps 20 --loss focal
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.nn.functional as F
from by_name import small_model
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


def focal(outputs, labels: torch.Tensor, num_items_in_batch: int | None = None) -> torch.Tensor:
    """A `compute_loss_func`: easy tokens count less."""
    labels = labels[:, 1:].flatten()
    logits = outputs.logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).sum() / (num_items_in_batch or len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--smoothing", type=float, default=0.0, help="of labels, by the trainer")
    parser.add_argument("--loss", choices=["focal"], help="in the place of the model's own")
    args = parser.parse_args()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    talks = [row["prompt"] + row["chosen"] for row in rows]
    texts = tokenizer.apply_chat_template(talks, tokenize=False)
    torch.manual_seed(0)
    model = small_model(tokenizer)
    reads_logits = args.smoothing or args.loss
    put = fastpo.lazy_logits if reads_logits else fastpo.attach
    with tempfile.TemporaryDirectory() as folder, put(model):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                label_smoothing_factor=args.smoothing,
                logging_steps=1,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]}),
            compute_loss_func=focal if args.loss else None,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"trainer: loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")


if __name__ == "__main__":
    main()

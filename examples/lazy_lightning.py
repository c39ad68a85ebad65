"""DPO as a LightningModule that reads `model(...).logits`, which are lazy.

python examples/lazy_lightning.py --steps 20
"""

from __future__ import annotations

import argparse
import copy

import pytorch_lightning as lightning
import torch
from by_hand import batches
from by_name import small_model
from lazy_loop import dpo, logps
from torch import Tensor, nn

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


class DPO(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.reference = model, copy.deepcopy(model).requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        with torch.no_grad():
            before = logps(self.reference, batch)
        loss = dpo(logps(self.model, batch), before)
        print(f"step {index + 1:>3}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    fastpo.patch(lazy=True)
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(max_steps=args.steps, **quiet)
    trainer.fit(DPO(small_model(tokenizer)), batches(rows, tokenizer))


if __name__ == "__main__":
    main()

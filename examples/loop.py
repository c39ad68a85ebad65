"""SimPO in a bare loop: hidden states, token log-probabilities, quantities, objective.

python examples/loop.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from by_hand import batches
from by_name import small_model

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="simpo", help="one that asks for no reference")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)
    model = small_model(tokenizer)
    objective = fastpo.objectives.get(args.objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step, batch in zip(range(1, args.steps + 1), batches(rows, tokenizer), strict=False):
        # Position t predicts token t + 1; prompt and padding are not scored.
        mask = batch["mask"][:, 1:]  # [2B, T - 1], the chosen rows first
        labels = batch["ids"][:, 1:].masked_fill(~mask, -100)
        attended = batch["attended"]
        hidden = model.model(batch["ids"], attention_mask=attended).last_hidden_state[:, :-1]
        stats = fastpo.linear_logps(hidden, model.lm_head.weight, labels)
        loss = fastpo.quantities.padded(stats, mask).rows(objective).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:>3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()

"""SimPO or DPO in a plain loop: hidden states, token log-probabilities, quantities, objective.

python examples/loop.py --steps 20
python examples/loop.py --objective dpo
"""

from __future__ import annotations

import argparse
import copy

import torch
from by_hand import Batch, batches
from by_name import small_model
from torch import nn

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


def scored(model: nn.Module, batch: Batch) -> fastpo.TokenStats:
    """Statistics of every token of a completion, [2B, T - 1], the chosen rows first."""
    # Position t predicts token t + 1; prompt and padding are not scored.
    labels = batch["ids"][:, 1:].masked_fill(~batch["mask"][:, 1:], -100)
    states = model.model(batch["ids"], attention_mask=batch["attended"]).last_hidden_state
    return fastpo.linear_logps(states[:, :-1], model.lm_head.weight, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="simpo", help="one of pairs")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)
    model = small_model(tokenizer)
    reference = copy.deepcopy(model)
    objective = fastpo.objectives.get(args.objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step, batch in zip(range(1, args.steps + 1), batches(rows, tokenizer), strict=False):
        with torch.no_grad():
            ref = scored(reference, batch)
        q = fastpo.quantities.padded(scored(model, batch), batch["mask"][:, 1:], ref=ref)
        loss = q.rows(objective).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:>3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()

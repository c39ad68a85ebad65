"""DPO in a plain loop that reads `model(...).logits`, which are lazy; optionally with accelerate.

python examples/lazy_loop.py --steps 20
python examples/lazy_loop.py --steps 20 --accelerate
accelerate launch examples/lazy_loop.py --accelerate
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from by_hand import batches
from by_name import small_model
from torch import Tensor

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


def logps(model: Any, batch: dict[str, Tensor]) -> Tensor:  # [2B], the chosen rows first
    """As in any loop: log-softmax, the label's column, a sum over the completion."""
    logits = model(batch["ids"], attention_mask=batch["attended"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, batch["ids"][:, 1:, None]).squeeze(-1)
    return (each * batch["mask"][:, 1:]).sum(-1)


def dpo(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accelerate", action="store_true", help="devices and processes as it has")
    args = parser.parse_args()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)
    model = small_model(tokenizer)
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    backward: Any = torch.Tensor.backward
    with fastpo.lazy_logits(model), fastpo.lazy_logits(reference):
        policy: Any = model
        if args.accelerate:
            from accelerate import Accelerator

            accelerator = Accelerator()
            policy, reference, optimizer = accelerator.prepare(model, reference, optimizer)
            backward = accelerator.backward
        for step, batch in zip(range(1, args.steps + 1), batches(rows, tokenizer), strict=False):
            with torch.no_grad():
                before = logps(reference, batch)
            loss = dpo(logps(policy, batch), before)
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            print(f"step {step:>3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()

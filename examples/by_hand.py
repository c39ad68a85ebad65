"""Objectives without a trainer: policy gradient, distillation, reward models, denoising.

    python examples/by_hand.py policy_gradient
    python examples/by_hand.py rewards --data pairs.jsonl --steps 30

Each family is one function that takes a batch of pairs and returns a loss; the loop is the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from by_name import small_model
from torch import Tensor, nn
from transformers import Qwen2ForSequenceClassification

import fastpo
from fastpo import objectives
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer

LENGTH = 128
Batch = dict[str, Tensor]  # ids, mask: [2B, T], the chosen rows first
Step = Callable[[Batch], Tensor]


def shifted(batch: Batch) -> tuple[Tensor, Tensor]:
    """Labels and the mask of the positions that predict them: [2B, T - 1]."""
    return batch["ids"][:, 1:], batch["mask"][:, 1:]


def policy_gradient(tokenizer) -> tuple[nn.Module, Step]:
    """REINFORCE on fixed completions: +1 for the chosen, -1 for the rejected."""
    model = small_model(tokenizer)
    loss_of = objectives.get("reinforce", reduction="mean")

    def step(batch: Batch) -> Tensor:
        labels, mask = shifted(batch)
        hidden = model.model(batch["ids"]).last_hidden_state[:, :-1]
        logps = fastpo.linear_logps(hidden, model.lm_head.weight, labels).logps
        signs = torch.ones(len(labels)).where(torch.arange(len(labels)) < len(labels) // 2, -1)
        return loss_of(logps, mask, signs).mean()

    return model, step


def distillation(tokenizer) -> tuple[nn.Module, Step]:
    """The whole next-token distribution of a wider teacher, without the logits of either."""
    student, teacher = small_model(tokenizer), small_model(tokenizer, hidden_size=192)
    nn.init.normal_(teacher.lm_head.weight, std=0.1)  # a teacher with opinions

    def step(batch: Batch) -> Tensor:
        _, mask = shifted(batch)
        with torch.no_grad():
            seen = teacher.model(batch["ids"]).last_hidden_state[:, :-1]
        hidden = student.model(batch["ids"]).last_hidden_state[:, :-1]
        heads = (student.lm_head.weight, seen, teacher.lm_head.weight.detach())
        found = fastpo.linear_divergence(hidden, *heads, kind="jsd", beta=0.5, mask=mask)
        return found.divergence.sum() / mask.sum()

    return student, step


def rewards(tokenizer) -> tuple[nn.Module, Step]:
    """A reward model by Bradley and Terry."""
    config = small_model(tokenizer).config
    config.num_labels = 1
    model = Qwen2ForSequenceClassification(config)

    def step(batch: Batch) -> Tensor:
        scores = model(batch["ids"], attention_mask=batch["attended"]).logits.squeeze(-1)
        return objectives.get("bt")(*scores.chunk(2)).mean()

    return model, step


def denoising(tokenizer) -> tuple[nn.Module, Step]:
    """Diffusion-DPO on embeddings of the answers: a small network predicts the noise in them."""
    size = 32
    embed = torch.randn(len(tokenizer), size)
    model = nn.Sequential(nn.Linear(size + 1, 128), nn.SiLU(), nn.Linear(128, size))
    reference = nn.Sequential(nn.Linear(size + 1, 128), nn.SiLU(), nn.Linear(128, size))
    reference.load_state_dict(model.state_dict())
    loss_of = objectives.get("diffusion_dpo", beta=10.0)

    def step(batch: Batch) -> Tensor:
        scored = batch["mask"].unsqueeze(-1)
        clean = (embed[batch["ids"]] * scored).sum(1) / scored.sum(1).clamp(min=1).sqrt()
        half = len(clean) // 2
        time, noise = torch.rand(half, 1).repeat(2, 1), torch.randn(half, size).repeat(2, 1)
        noisy = torch.cat([(1 - time).sqrt() * clean + time.sqrt() * noise, time], 1)
        errors = (model(noisy) - noise).square().mean(1).chunk(2)
        with torch.no_grad():
            own = (reference(noisy) - noise).square().mean(1).chunk(2)
        return loss_of(*errors, *own).mean()

    return model, step


FAMILIES = {f.__name__: f for f in (policy_gradient, distillation, rewards, denoising)}


def batches(rows: list, tokenizer, size: int = 4) -> Iterator[Batch]:
    while True:
        for start in range(0, len(rows) - size + 1, size):
            part = rows[start : start + size]
            yield encoded(
                [(row, side) for side in ("chosen", "rejected") for row in part], tokenizer
            )


def encoded(sides: list, tokenizer) -> Batch:
    """Prompt and answer in one row; the last eight positions always belong to the answer."""
    options = {"add_generation_prompt": True, "tokenize": False}
    prompts = [tokenizer.apply_chat_template(row["prompt"], **options) for row, _ in sides]
    answers = [row[side][0]["content"] for row, side in sides]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    fixed = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    made = tokenizer(whole, return_tensors="pt", **fixed)
    first = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    answered = torch.arange(LENGTH) >= first.clamp(max=LENGTH - 8)[:, None]
    attended = made["attention_mask"].bool()
    return {"ids": made["input_ids"], "mask": answered & attended, "attended": attended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--data", type=Path, help="JSONL of prompt, chosen, rejected (messages)")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    lines = args.data.open(encoding="utf-8") if args.data else ()
    rows = [json.loads(line) for line in lines] or embedded_pairs().train
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    model, step = FAMILIES[args.family](tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch, _ in zip(batches(rows, tokenizer), range(args.steps), strict=False):
        loss = step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses):>3}  loss {losses[-1]:.4f}")
    fifth = max(len(losses) // 5, 1)
    first, last = (sum(part) / fifth for part in (losses[:fifth], losses[-fifth:]))
    print(f"{args.family}: loss {first:.4f} in the first steps, {last:.4f} in the last")


if __name__ == "__main__":
    main()

"""Lazy logits of other models than causal ones: one line for all, the steps stay as they are.

    python examples/lazy_models.py encoder_decoder
    python examples/lazy_models.py vision --steps 20

A function builds a small model with random weights and returns its step, which takes a batch of
pairs and returns a loss. No step uses fastpo.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from by_hand import batches
from by_name import small_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer

Batch = dict[str, Tensor]  # ids, mask, attended: [2B, T], the chosen rows first
Step = Callable[[Batch], Tensor]


def logps(logits: Tensor, labels: Tensor) -> Tensor:  # [2B] of [2B, T, V], [2B, T]
    """As in every trainer: log-softmax, the label's column, a sum over the answer."""
    scored = labels != -100
    each = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (each * scored).sum(-1)


def dpo(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def encoder_decoder(tokenizer) -> tuple[nn.Module, Step]:
    """DPO of a T5, which scales the input of its head; the encoder reads the prompt."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    words = {"vocab_size": len(tokenizer), "decoder_start_token_id": tokenizer.pad_token_id}
    model = T5ForConditionalGeneration(T5Config(**sizes, **words, dropout_rate=0.0))
    reference = copy.deepcopy(model)

    def step(batch: Batch) -> Tensor:
        labels = batch["ids"].masked_fill(~batch["mask"], -100)
        asked = {"input_ids": batch["ids"], "attention_mask": batch["attended"] & ~batch["mask"]}
        with torch.no_grad():
            before = logps(reference(**asked, labels=labels).logits, labels)
        return dpo(logps(model(**asked, labels=labels).logits, labels), before)

    return model, step


def vision(tokenizer) -> tuple[nn.Module, Step]:
    """SimPO of a Llava: four patches of an image before each prompt."""
    image = len(tokenizer) - 1  # a word that no text has
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = small_model(tokenizer).config
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=image)
    )

    def step(batch: Batch) -> Tensor:
        patches = torch.full((len(batch["ids"]), 4), image)
        ids = torch.cat((patches, batch["ids"]), 1)
        seen = torch.cat((torch.ones_like(patches), batch["attended"]), 1)
        pixels = torch.randn(len(ids), 3, 28, 28)
        logits = model(input_ids=ids, attention_mask=seen, pixel_values=pixels).logits
        labels = batch["ids"].masked_fill(~batch["mask"], -100)
        lengths = batch["mask"].sum(-1)
        chosen, rejected = (2.0 * logps(logits[:, 3:-1], labels) / lengths).chunk(2)
        return -F.logsigmoid(chosen - rejected - 1.0).mean()

    return model, step


class WithValue(nn.Module):
    """As TRL's AutoModelForCausalLMWithValueHead: logits, and a value of each position."""

    def __init__(self, model: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.model, self.value = model, nn.Linear(hidden_size, 1)

    def forward(self, ids: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(ids, attention_mask=attended, output_hidden_states=True)
        return found.logits, self.value(found.hidden_states[-1]).squeeze(-1)


def value_head(tokenizer) -> tuple[nn.Module, Step]:
    """A step of an actor with a critic: chosen answers earn 1, rejected ones nothing."""
    language = small_model(tokenizer)
    model = WithValue(language, language.config.hidden_size)

    def step(batch: Batch) -> Tensor:
        logits, values = (x[:, :-1] for x in model(batch["ids"], batch["attended"]))
        labels, mask = batch["ids"][:, 1:], batch["mask"][:, 1:]
        rewards = (torch.arange(len(labels)) < len(labels) // 2).float()[:, None]
        each = logits.log_softmax(-1)
        entropy = -(each.exp() * each).sum(-1)
        taken = each.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        losses = -(rewards - values.detach()) * taken + (values - rewards) ** 2 - 0.01 * entropy
        return (losses * mask).sum() / mask.sum()

    return model, step


def chunked(tokenizer) -> tuple[nn.Module, Step]:
    """A recipe of torchtune: logits in eight chunks of the length, cross-entropy of each alone."""
    model = small_model(tokenizer)

    def step(batch: Batch) -> Tensor:
        logits = model(batch["ids"], attention_mask=batch["attended"]).logits[:, :-1]
        labels = batch["ids"].masked_fill(~batch["mask"], -100)[:, 1:]
        loss = sum(
            F.cross_entropy(part.float().flatten(0, 1), said.flatten(), reduction="sum")
            for part, said in zip(logits.chunk(8, 1), labels.chunk(8, 1), strict=True)
        )
        return loss / (labels != -100).sum()

    return model, step


def rewards(tokenizer) -> tuple[nn.Module, Step]:
    """A Bradley-Terry reward model: it has no vocabulary head, and nothing changes."""
    config = small_model(tokenizer).config
    config.num_labels = 1
    model = Qwen2ForSequenceClassification(config)

    def step(batch: Batch) -> Tensor:
        scores = model(batch["ids"], attention_mask=batch["attended"]).logits.squeeze(-1)
        chosen, rejected = scores.chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    return model, step


MODELS = {f.__name__: f for f in (encoder_decoder, vision, value_head, chunked, rewards)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    fastpo.patch(lazy=True)
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)
    model, step = MODELS[args.model](tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for count, batch in zip(range(1, args.steps + 1), batches(rows, tokenizer), strict=False):
        loss = step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {count:>3}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()

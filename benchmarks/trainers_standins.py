"""What stands in for a trainer's surroundings in `trainers.py`: sampling, a server, rewards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class Server:
    """In the place of TRL's client: a teacher that gives most to a few words, without a model."""

    def __init__(self, base_url: str, connection_timeout: float) -> None:
        self.seeds = itertools.count()

    def get_sequence_logprobs(
        self,
        sequences: list[list[int]],
        prompt_lengths: list[int],
        top_logprobs: int,
        temperature: float,
    ) -> dict[str, list[Any]]:
        generator = torch.Generator().manual_seed(next(self.seeds))
        lengths = [len(ids) - n for ids, n in zip(sequences, prompt_lengths, strict=True)]
        # A word may come twice: it counts twice, with the patch as without.
        words = [torch.randint(0, 100, (n, top_logprobs), generator=generator) for n in lengths]
        each = math.log(0.9 / top_logprobs)
        return {
            "logprobs": [[[each] * top_logprobs] * n for n in lengths],
            "logprob_token_ids": [ids.tolist() for ids in words],
            "actual_logprobs": [[[each]] * n for n in lengths],
        }


def drawer(words: int, sampled: int) -> Callable[..., Any]:
    """In the place of `generate`: completions of the full length, the same in every process."""
    seeds = itertools.count()

    def generate(model: Any, input_ids: Any, generation_config: Any, **options: Any) -> Any:
        generator = torch.Generator().manual_seed(next(seeds))
        prompts = input_ids.repeat_interleave(generation_config.num_return_sequences or 1, 0)
        shape = len(prompts), sampled
        # The first ids are the tokenizer's own: a mark of the end would cut the row short.
        drawn = torch.randint(100, words, shape, generator=generator)
        sequences = torch.cat((prompts, drawn.to(prompts.device)), 1)
        wrapped = options.get("return_dict_in_generate")
        return SimpleNamespace(sequences=sequences) if wrapped else sequences

    return generate


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Any that differs between two completions; an equal pair would train nothing."""
    said = (one if isinstance(one, str) else one[0]["content"] for one in completions)
    return [len(text) % 7 / 7 for text in said]

"""What the model says before and after the training; runs inside a worker."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .data import Row, is_conversational
from .jobs import Job
from .train import Emit, device

LONGEST = 64  # tokens


def answer(job: Job, emit: Emit) -> None:
    """The likeliest words of the models in `job.model` and `job.out` to the shortest prompts.

    Plain transformers, as whoever loads the trained model would ask it.
    """
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    models = [_load(folder) for folder in (job.model, job.out)]
    rows = sorted(job.read_rows()["held_out"], key=lambda row: len(str(row["prompt"])))
    for row in rows[: job.steps]:
        before, after = (_say(model, tokenizer, row) for model in models)
        emit(prompt=_question(row), before=before, after=after)


def _load(folder: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device())


def _question(row: Row) -> str:
    return row["prompt"][-1]["content"] if is_conversational(row) else row["prompt"]


def _say(model: Any, tokenizer: Any, row: Row) -> str:
    prompt = row["prompt"]
    if is_conversational(row):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not is_conversational(row))
    given = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    ids = model.generate(**given, max_new_tokens=LONGEST, do_sample=False)
    said = ids[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True)

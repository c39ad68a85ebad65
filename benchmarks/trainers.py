"""TRL's trainers with and without `fastpo.patch`: peak memory and seconds of a step.

A small Qwen2 with a head of 151,936 words on rows of 1,024 tokens. Every cell has a process of its
own; memory is the growth of the peak from the start of training, resident on a CPU. No figure is
kept of a trainer whose losses or gradients differ between the two. Where a trainer samples, words
are drawn without the model: the patch does not touch sampling, and it would take most of the time.

    python benchmarks/trainers.py --out benchmarks/results/cpu_epyc_trainers.json

`--words 2000 --length 96 --hidden 16` runs all of them in minutes; its figures say nothing.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import fastpo
from fastpo.bench import machine
from fastpo.bench.process import fresh
from fastpo.bench.report import write

WORDS, LENGTH = 151_936, 1024


@dataclass(frozen=True)
class Sizes:
    words: int
    length: int  # tokens of a row
    hidden: int
    steps: int

    @property
    def sampled(self) -> int:
        return self.length * 3 // 4  # the prompts are short, of several lengths


Changes = Callable[[Sizes], dict[str, Any]]


def whole(sizes: Sizes) -> dict[str, Any]:
    return {"max_length": sizes.length}


def sampled(sizes: Sizes) -> dict[str, Any]:
    return {"max_completion_length": sizes.sampled}


def both(sizes: Sizes) -> dict[str, Any]:
    return whole(sizes) | sampled(sizes)


@dataclass(frozen=True)
class Entry:
    """How a trainer is fed and configured."""

    prefix: str  # TRL's
    module: str
    rows: int  # of the dataset for a step: 2 sequences, of TPO 3
    data: str  # a key of COLUMNS; "drawn": none, the trainer's loss alone is run
    changes: Changes = whole
    options: dict[str, Any] = field(default_factory=dict)  # of the config
    arguments: tuple[str, ...] = ()  # of the trainer, keys of ARGUMENTS
    built: bool = False  # takes a model, no path


GROUPS = {"num_generations": 2}
DISTILLED = ("teacher_model",)
REWARDED = ("reward_funcs",)
TRAINERS = {
    "DPO": Entry("DPO", "trl", 1, "pairs"),
    "SFT": Entry("SFT", "trl", 2, "text"),
    "SFT_smoothed": Entry("SFT", "trl", 2, "text", options={"label_smoothing_factor": 0.1}),
    "CPO": Entry("CPO", "trl.experimental.cpo", 1, "pairs", built=True),
    "ORPO": Entry("ORPO", "trl.experimental.orpo", 1, "pairs", built=True),
    "KTO": Entry("KTO", "trl", 2, "single"),
    "TPO": Entry("TPO", "trl.experimental.tpo", 1, "triples"),
    "A2PO": Entry(
        "A2PO",
        "trl.experimental.a2po",
        2,
        "prompts",
        sampled,
        {"num_value_samples": 2},
        REWARDED,
    ),
    "GRPO": Entry("GRPO", "trl", 1, "prompts", sampled, {**GROUPS, "beta": 0.1}, REWARDED),
    "RLOO": Entry("RLOO", "trl", 1, "prompts", sampled, GROUPS, REWARDED),
    "Distillation": Entry("Distillation", "trl", 2, "prompts", sampled, {}, DISTILLED),
    "GKD": Entry(
        "GKD", "trl.experimental.gkd", 2, "messages", whole, {"lmbda": 0.0}, DISTILLED, True
    ),
    "GOLD": Entry(
        "GOLD",
        "trl.experimental.gold",
        2,
        "messages",
        both,
        {"lmbda": 0.0, "use_uld_loss": False},
        DISTILLED,
        True,
    ),
    "SDFT": Entry("SDFT", "trl.experimental.sdft", 2, "drawn"),
    "SDPO": Entry("SDPO", "trl.experimental.sdpo", 2, "drawn"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--add", action="store_true", help="to the rows that --out has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = Sizes(args.words, args.length, args.hidden, args.steps)
    report = machine.facts("cpu") | {
        "what": "trainers",
        "dtype": "float32",
        "V": args.words,
        "T": args.length,
        "H": args.hidden,
        "sequences_per_step": 2,
        "rows": json.loads(args.out.read_text())["rows"] if args.add else [],
    }
    for name in args.trainers:
        cells = []
        for patched in (False, True):
            cell = fresh(measure, name, patched, sizes, args.threads)
            print(
                "{trainer:12} patched={patched}  {step_s:6.2f} s  {mib:7.0f} MiB".format(**cell),
                flush=True,
            )
            cells.append(cell)
        compare(name, *cells)
        report["rows"] += cells
        if args.out:
            write(report, args.out)


def compare(name: str, own: dict[str, Any], ours: dict[str, Any]) -> None:
    """The gradients', too: a loss of centred rewards is about 0 whatever the log-probabilities."""
    for what in ("losses", "grad_norms"):
        for a, b in zip(own[what], ours[what], strict=True):
            if not abs(a - b) <= 1e-4 * max(abs(a), 1.0):
                raise AssertionError(f"{name}: {what} {own[what]} and {ours[what]} differ")


def measure(name: str, patched: bool, sizes: Sizes, threads: int) -> dict[str, Any]:
    """Seconds of the steps after the first, growth of the peak, losses."""
    torch.set_num_threads(threads)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, fastpo.patched() if patched else nullcontext():
        trainer = build(TRAINERS[name], folder, sizes)
        clock = watch(trainer)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "trainer": name,
        "patched": patched,
        "step_s": statistics.median(clock.seconds[1:]),
        "runs_s": clock.seconds[1:],
        "mib": clock.peak.mib(),
        # Of other work as well: seconds are only comparable within a pair.
        "load_average": machine.load_average(),
        "losses": [log["loss"] for log in logs],
        "grad_norms": [log["grad_norm"] for log in logs],
    }


def watch(trainer: Any) -> Any:
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.peak = machine.Peak("cpu")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    return clock


def build(entry: Entry, folder: str, sizes: Sizes) -> Any:
    """On texts longer than a row, so that all rows have `sizes.length` tokens, or just fewer."""
    import datasets
    from transformers import Qwen2ForCausalLM

    from fastpo.demo.data import embedded_pairs
    from fastpo.demo.tokenizer import texts_of, train_tokenizer

    datasets.disable_progress_bars()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), min(4096, sizes.words))
    model = small_model(tokenizer, sizes, seed=0)
    if entry.data == "drawn":
        return Loop(entry, model, small_model(tokenizer, sizes, seed=1), sizes)
    model.save_pretrained(f"{folder}/model")
    Qwen2ForCausalLM.generate = drawer(sizes)  # this process has no other use
    module = importlib.import_module(entry.module)
    arguments = {
        "teacher_model": small_model(tokenizer, sizes, seed=1),
        "reward_funcs": reward,
    }
    return getattr(module, f"{entry.prefix}Trainer")(
        model=model if entry.built else f"{folder}/model",
        args=settings(entry, module, folder, sizes),
        train_dataset=datasets.Dataset.from_list(texts(entry, rows, sizes, tokenizer)),
        processing_class=tokenizer,
        **{name: arguments[name] for name in entry.arguments},
    )


def small_model(tokenizer: Any, sizes: Sizes, *, seed: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=sizes.words,
            hidden_size=sizes.hidden,
            intermediate_size=2 * sizes.hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def settings(entry: Entry, module: Any, folder: str, sizes: Sizes) -> Any:
    return getattr(module, f"{entry.prefix}Config")(
        output_dir=folder,
        max_steps=sizes.steps,
        per_device_train_batch_size=2 if entry.options.keys() & GROUPS else entry.rows,
        learning_rate=0.01,
        optim="sgd",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        **entry.changes(sizes),
        **entry.options,
    )


class Loop:
    """Of a trainer whose constructor asks for judges: its logits and its loss, and plain SGD."""

    def __init__(self, entry: Entry, model: Any, teacher: Any, sizes: Sizes) -> None:
        from accelerate import Accelerator

        kind = getattr(importlib.import_module(entry.module), f"{entry.prefix}Trainer")
        self.trainer = kind.__new__(kind)
        self.trainer.accelerator = Accelerator(cpu=True)
        self.trainer.temperature, self.trainer.model_kwarg_keys = 1.0, {"logits_to_keep"}
        self.divergence = importlib.import_module(
            kind.__module__
        ).compute_full_logit_self_distillation_loss
        self.model, self.teacher, self.sizes = model, teacher.eval(), sizes
        self.state = SimpleNamespace(log_history=[])
        self.callbacks: list[Any] = []

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def remove_callback(self, kind: type) -> None:
        """It has only what was added."""

    def train(self) -> None:
        (clock,) = self.callbacks
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        clock.on_train_begin()
        for step in range(self.sizes.steps):
            clock.on_step_begin()
            loss = self.loss(step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.state.log_history.append({"loss": loss.item(), "grad_norm": norm.item()})
            clock.on_step_end()

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        shape = 2, self.sizes.length
        ids = torch.randint(100, self.sizes.words, shape, generator=generator)
        arguments = ids, torch.ones_like(ids), self.sizes.sampled
        own = self.trainer._forward_logits(self.model, *arguments)
        with torch.no_grad():
            theirs = self.trainer._forward_logits(self.teacher, *arguments)
        return self.divergence(own, theirs, distillation_alpha=0.5).mean()


def drawer(sizes: Sizes) -> Callable[..., Any]:
    """In the place of `generate`: completions of the full length, the same in every process."""
    seeds = itertools.count()

    def generate(model: Any, input_ids: Any, generation_config: Any, **_: Any) -> Any:
        generator = torch.Generator().manual_seed(next(seeds))
        prompts = input_ids.repeat_interleave(generation_config.num_return_sequences or 1, 0)
        shape = len(prompts), sizes.sampled
        # The first ids are the tokenizer's own: a mark of the end would cut the row short.
        drawn = torch.randint(100, sizes.words, shape, generator=generator)
        return torch.cat((prompts, drawn.to(prompts.device)), 1)

    return generate


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Any that differs between two completions; an equal pair would train nothing."""
    said = (one if isinstance(one, str) else one[0]["content"] for one in completions)
    return [len(text) % 7 / 7 for text in said]


Rows = list[dict[str, Any]]
COLUMNS: dict[str, Callable[..., dict[str, Any]]] = {
    "pairs": lambda prompt, a, b, i: {"prompt": prompt, "chosen": a, "rejected": b},
    "triples": lambda prompt, a, b, i: {
        "prompt": prompt,
        "chosen": a,
        "rejected": b,
        "reference": a,
    },
    "single": lambda prompt, a, b, i: {
        "prompt": prompt,
        "completion": a if i % 2 else b,
        "label": bool(i % 2),
    },
    "text": lambda prompt, a, b, i: {"text": a},
    "prompts": lambda prompt, a, b, i: {"prompt": prompt},
    "messages": lambda prompt, a, b, i: {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": a}]
    },
}


def texts(entry: Entry, rows: Rows, sizes: Sizes, tokenizer: Any) -> Rows:
    def long(side: str, start: int) -> str:
        text = " ".join(row[side][0]["content"] for row in rows[start : start + 120])
        if entry.data != "messages":
            return text
        # GKD and GOLD refuse a row whose prompt is cut away.
        return tokenizer.decode(tokenizer(text).input_ids[: sizes.sampled])

    found = []
    for i in range(entry.rows * sizes.steps):
        prompt = rows[i]["prompt"][0]["content"]
        completions = long("chosen", 10 * i), long("rejected", 10 * i)
        found.append(COLUMNS[entry.data](prompt, *completions, i))
    return found


if __name__ == "__main__":
    main()

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
from typing import Any

import torch
from trainers_standins import Server, drawer, reward

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


Rows = list[dict[str, Any]]
Changes = Callable[[Sizes], dict[str, Any]]


def whole(sizes: Sizes) -> dict[str, Any]:
    return {"max_length": sizes.length}


def sampled(sizes: Sizes) -> dict[str, Any]:
    return {"max_completion_length": sizes.sampled}


def online(sizes: Sizes) -> dict[str, Any]:
    return whole(sizes) | {"max_new_tokens": sizes.sampled}


def both(sizes: Sizes) -> dict[str, Any]:
    return whole(sizes) | sampled(sizes)


@dataclass(frozen=True)
class Entry:
    """How a trainer is fed and configured."""

    prefix: str  # TRL's
    module: str
    rows: int  # of the dataset for a step: 2 sequences, of TPO 3
    data: str  # a key of COLUMNS
    changes: Changes = whole
    options: dict[str, Any] = field(default_factory=dict)  # of the config
    arguments: tuple[str, ...] = ()  # of the trainer, keys of ARGUMENTS
    built: bool = False  # takes a model, no path


GROUPS = {"num_generations": 2}
WHOLE = {"distillation_mode": "full_logits", "distillation_alpha": 0.5}
# Between flat rows, sorted, the sign of a difference is a matter of rounding.
PEAKED = {"uld_student_temperature": 0.05, "uld_teacher_temperature": 0.04}
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
    "GOLD_ULD": Entry(
        "GOLD",
        "trl.experimental.gold",
        2,
        "messages",
        both,
        {"lmbda": 0.0, "use_uld_loss": True, **PEAKED},
        DISTILLED,
        True,
    ),
    "IWOPD": Entry("IWOPD", "trl.experimental.iw_opd", 2, "messages", both, {}, DISTILLED),
    "ServerDistillation": Entry(
        "ServerDistillation",
        "trl.experimental.server_distillation",
        2,
        "prompts",
        sampled,
        {"beta": 0.0, "loss_top_k": 16, "teacher_model_server_url": "http://teacher"},
    ),
    "OnlineDPO": Entry(
        "OnlineDPO", "trl.experimental.online_dpo", 1, "prompts", online, {}, REWARDED
    ),
    "SDFT": Entry("SDFT", "trl.experimental.sdft", 1, "shown", sampled, {**GROUPS, **WHOLE}),
    "SDPO": Entry(
        "SDPO",
        "trl.experimental.sdpo",
        1,
        "prompts",
        sampled,
        # Every completion shows the other how it is done.
        {**GROUPS, **WHOLE, "success_reward_threshold": -1.0},
        REWARDED,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--add", action="store_true", help="to the other rows that --out has")
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
        "rows": kept(args.out, args.trainers) if args.add else [],
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


def kept(path: Path, measured: list[str]) -> Rows:
    rows: Rows = json.loads(path.read_text())["rows"]
    return [row for row in rows if row["trainer"] not in measured]


def compare(name: str, own: dict[str, Any], ours: dict[str, Any]) -> None:
    """The gradients', too: a loss of centred rewards is about 0 whatever the log-probabilities."""
    for what, least in (("losses", 1.0), ("grad_norms", 1e-4)):
        for a, b in zip(own[what], ours[what], strict=True):
            if not abs(a - b) <= 1e-4 * max(abs(a), least):
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
    from trl.generation import vllm_client

    from fastpo.demo.data import embedded_pairs
    from fastpo.demo.tokenizer import texts_of, train_tokenizer

    datasets.disable_progress_bars()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), min(4096, sizes.words))
    model = small_model(tokenizer, sizes, seed=0)
    model.save_pretrained(f"{folder}/model")
    teacher = small_model(tokenizer, sizes, seed=1)
    teacher.config._name_or_path = f"{folder}/same"  # where IW-OPD looks for its tokenizer
    tokenizer.save_pretrained(f"{folder}/same")
    # GOLD's teacher has another one, of fewer words.
    train_tokenizer(texts_of(rows), min(1024, sizes.words)).save_pretrained(f"{folder}/other")
    Qwen2ForCausalLM.generate = drawer(sizes.words, sizes.sampled)  # this process has no other use
    vllm_client.VLLMClient = Server
    module = importlib.import_module(entry.module)
    arguments = {"teacher_model": teacher, "reward_funcs": reward}
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
    across = entry.options.get("use_uld_loss")
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
        **({"teacher_tokenizer_name_or_path": f"{folder}/other"} if across else {}),
    )


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
    "shown": lambda prompt, a, b, i: {"prompt": prompt, "privileged_context": a[:200]},
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

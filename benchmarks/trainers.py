"""TRL's trainers with and without `fastpo.patch`: peak memory and seconds of a step.

A small Qwen2 with a head of 151,936 words on rows of 1,024 tokens. Every cell has a process of its
own; memory is the growth of the peak from the start of training, resident on a CPU. No figure is
kept of a trainer whose losses differ between the two.

    python benchmarks/trainers.py --out benchmarks/results/cpu_epyc_trainers.json
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import fastpo
from fastpo.bench import machine
from fastpo.bench.process import fresh
from fastpo.bench.report import write

WORDS, LENGTH = 151_936, 1024
# Module, and rows of the dataset per step: 2 sequences for each.
TRAINERS = {
    "DPO": ("trl", 1),
    "SFT": ("trl", 2),
    "CPO": ("trl.experimental.cpo", 1),
    "ORPO": ("trl.experimental.orpo", 1),
    "KTO": ("trl", 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--add", action="store_true", help="to the rows that --out has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = machine.facts("cpu") | {
        "what": "trainers",
        "dtype": "float32",
        "V": WORDS,
        "T": LENGTH,
        "H": args.hidden,
        "sequences_per_step": 2,
        "rows": json.loads(args.out.read_text())["rows"] if args.add else [],
    }
    for name in args.trainers:
        cells = []
        for patched in (0, 1):
            cell = fresh(measure, name, patched, args.hidden, args.threads, args.steps)
            print(
                "{trainer:5} patched={patched}  {step_s:6.2f} s  {mib:7.0f} MiB".format(**cell),
                flush=True,
            )
            cells.append(cell)
        compare(name, *cells)
        report["rows"] += cells
        if args.out:
            write(report, args.out)


def compare(name: str, own: dict[str, Any], ours: dict[str, Any]) -> None:
    for a, b in zip(own["losses"], ours["losses"], strict=True):
        if abs(a - b) > 1e-4 * max(abs(a), 1.0):
            raise AssertionError(f"{name}: losses {own['losses']} and {ours['losses']} differ")


def measure(name: str, patched: int, hidden: int, threads: int, steps: int) -> dict[str, Any]:
    """Seconds of the steps after the first, growth of the peak, losses."""
    torch.set_num_threads(threads)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, fastpo.patched() if patched else nullcontext():
        trainer = build(name, folder, hidden, steps)
        clock = watch(trainer)
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {
        "trainer": name,
        "patched": bool(patched),
        "step_s": statistics.median(clock.seconds[1:]),
        "runs_s": clock.seconds[1:],
        "mib": clock.peak.mib(),
        # Of other work as well: seconds are only comparable within a pair.
        "load_average": machine.load_average(),
        "losses": losses,
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


def build(name: str, folder: str, hidden: int, steps: int) -> Any:
    """On texts longer than a row, so that all rows have `LENGTH` tokens."""
    import datasets
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from fastpo.demo.data import embedded_pairs
    from fastpo.demo.tokenizer import texts_of, train_tokenizer

    datasets.disable_progress_bars()
    rows = embedded_pairs().train
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(f"{folder}/model")
    place, batch = TRAINERS[name]
    module = importlib.import_module(place)
    settings = getattr(module, f"{name}Config")(
        output_dir=folder,
        max_steps=steps,
        max_length=LENGTH,
        per_device_train_batch_size=batch,
        learning_rate=0.01,
        optim="sgd",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    model = f"{folder}/model"
    return getattr(module, f"{name}Trainer")(
        Qwen2ForCausalLM.from_pretrained(model) if name in ("CPO", "ORPO") else model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(texts(name, rows, steps)),
        processing_class=tokenizer,
    )


def texts(name: str, rows: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    def long(side: str, start: int) -> str:
        return " ".join(row[side][0]["content"] for row in rows[start : start + 120])

    found: list[dict[str, Any]] = []
    for i in range(TRAINERS[name][1] * steps):
        prompt = rows[i]["prompt"][0]["content"]
        chosen, rejected = long("chosen", 10 * i), long("rejected", 10 * i)
        if name == "SFT":
            found.append({"text": chosen})
        elif name == "KTO":
            completion = chosen if i % 2 else rejected
            found.append({"prompt": prompt, "completion": completion, "label": bool(i % 2)})
        else:
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


if __name__ == "__main__":
    main()

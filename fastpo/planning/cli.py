"""`fastpo plan`: the arguments, the output and the exit code of a plan."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..outputs import check_file
from .names import ATTENTION, DTYPES, OPTIMIZERS, REFERENCES, STRATEGIES, TRAINERS, check_path

# argument of `plan_step`: what the help says of it; the others are below.
_CHOICES = {
    "--trainer": (TRAINERS, "default: dpo"),
    "--dtype": (DTYPES, "of weights; mixed: float32; default: bf16"),
    "--optimizer": (OPTIMIZERS, "default: adamw"),
    "--attention": (ATTENTION, "default: sdpa, with a mask"),
    "--reference": (REFERENCES, "default: the trainer's own"),
    "--strategy": (STRATEGIES, "default: ddp"),
}


def add(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        argument_default=argparse.SUPPRESS,  # what is not given is left to `plan_step`
        help="what a training step needs, and what fits",
        description="Memory of one step with TRL's head and with fastpo's, told by running it on "
        "tensors that hold nothing; the longest context and the largest batch that fit. "
        "`fastpo plan head` is about one call of the head.",
        epilog="example: fastpo plan --model ./Qwen2.5-7B --gpu h100 --lora r=16 "
        "--gradient-checkpointing --context 8192",
    )
    plan.set_defaults(command=_plan)
    _add_step(plan.add_argument)
    option = plan.add_argument
    option("--no-search", dest="search", action="store_false", help="do not look for what fits")
    option("--measure", action="store_true", help="also run the step and say what it held")
    option("--plot", type=Path, metavar="FILE.png")
    option("--json", type=Path, metavar="FILE")
    _add_head(plan.add_subparsers(title="also", metavar="head"))


def _add_step(option: Any) -> None:
    option("--model", metavar="PATH", help="folder or config.json; nothing is downloaded")
    option(
        "--teacher", metavar="PATH", help="of gkd and distillation; default: the size of --model"
    )
    for name, (choices, text) in _CHOICES.items():
        option(name, metavar="NAME", help=f"{', '.join(choices)}; {text}")
    option("--gpu", metavar="CARD", help="h100, a100, 4090, …, or a size as 80GiB")
    option("--device", metavar="NAME", help="cuda or cpu; default: cuda")
    option("--context", type=int, metavar="T", help="prompt and answer; default: 2048")
    option(
        "--batch",
        type=int,
        metavar="B",
        help="items of a device, pairs for DPO; default: 1, of grpo 8, of rloo 2",
    )
    option("--prompt", type=float, metavar="X", help="its share of the context; default: 0.5")
    option("--lora", metavar="r=16,targets=q_proj+v_proj", nargs="?", const="r=16")
    option("--load-in-4bit", action="store_true", help="the adapted model, by bitsandbytes")
    option(
        "--gradient-checkpointing",
        dest="checkpointing",
        nargs="?",
        const="layers",
        metavar="offload",
        help="recompute the layers; offload: and keep their inputs in host memory",
    )
    option(
        "--shared-prompts",
        metavar="P:C[,K]",
        nargs="?",
        const="",
        help="fastpo computes prompts once: size of prompt to answer, and K rows of a prompt",
    )
    option("--budget", type=int, metavar="BYTES", help="what fastpo's head may keep")
    option("--devices", type=int, metavar="N")
    option("--data", type=Path, metavar="FILE", help="lengths of its rows: JSONL, JSON, Parquet")


def _add_head(commands: Any) -> None:
    head = commands.add_parser(
        "head",
        help="what the head would do for one shape",
        description="Mode, tiles, bytes and matrix products of `linear_logps` for one shape.",
        epilog="example: fastpo plan head 8192 151936 896 --frozen-head",
    )
    head.set_defaults(command=_head)

    def option(name: str, **settings: Any) -> None:
        head.add_argument(name, dest=f"head_{name.lstrip('-').replace('-', '_')}", **settings)

    def size(name: str, text: str) -> None:
        head.add_argument(f"head_{name}", metavar=name, type=int, help=text)

    size("tokens", "scored tokens")
    size("vocab", "words of the head")
    size("hidden", "hidden size")
    option("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    option("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    option("--frozen-head", action="store_true", help="the head is not trained (LoRA)")
    option("--no-grad", action="store_true", help="only score")
    option(
        "--budget",
        type=int,
        metavar="BYTES",
        help="kept for the backward; default: 4·V·H, or a 16th of the GPU here if more",
    )


def _plan(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name != "command"}
    files = {name: given.pop(name) for name in ("plot", "json") if name in given}
    try:
        for name, path in files.items():
            check_file(name, path)
        if "model" not in given:
            raise ValueError("--model: expected a folder or a config.json, got none")
        check_path(given["model"], "model")  # before what takes seconds to import
        _check_packages(adapted="lora" in given)
        from . import plot
        from .plan import plan_step

        made = plan_step(given.pop("model"), **given)
        if "plot" in files:
            plot.save(made, files["plot"])
        if "json" in files:
            files["json"].write_text(made.as_json() + "\n", encoding="utf-8")
        print(made)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _complain(error)
    return 1 if made.fits is False else 0


def _head(options: argparse.Namespace) -> int:
    import torch

    from ..planner import plan

    of_step = [x for x in vars(options) if x != "command" and not x.startswith("head_")]
    if of_step:
        return _complain(ValueError(f"head: expected no options before it, got {of_step[0]}"))
    try:
        made = plan(
            options.head_tokens,
            options.head_vocab,
            options.head_hidden,
            dtype=getattr(torch, options.head_dtype),
            device=options.head_device,
            train_hidden=not options.head_no_grad,
            train_head=not (options.head_no_grad or options.head_frozen_head),
            budget=options.head_budget,
        )
    except ValueError as error:
        return _complain(error)
    print(made)
    return 0


def _check_packages(adapted: bool) -> None:
    """TRL's column is computed by TRL's own functions."""
    needed = ("transformers", "trl", *(("peft",) if adapted else ()))
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f"expected {', '.join(missing)}, got none; pip install 'fastpo[trl]'")


def _complain(error: Exception) -> int:
    print(f"fastpo plan: error: {error}", file=sys.stderr)
    return 2

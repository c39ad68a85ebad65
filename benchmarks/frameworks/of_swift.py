"""ms-swift: `swift rlhf` and `swift sft`, which start a Python process for their work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import Case, Framework, Pairs, Sizes


def _rlhf(kind: str, **options: Any) -> dict[str, Any]:
    return {"command": "rlhf", "rlhf_type": kind, **options}


_PLUGIN = {"external_plugins": Path(__file__).with_name("swift_plugin.py")}
_SAMPLED = {
    "num_generations": 4,
    "max_completion_length": 128,
    "beta": 0.04,
    "reward_funcs": "lengths",
    **_PLUGIN,
}
_PADDING_FREE = {"padding_free": "true", "attn_impl": "flash_attention_2", **_PLUGIN}

CASES = (
    Case("DPO", "pairs", _rlhf("dpo")),
    Case("DPO, LoRA", "pairs", _rlhf("dpo"), lora=True),
    Case("DPO, padding_free", "pairs", _rlhf("dpo", **_PADDING_FREE)),
    Case("CPO", "pairs", _rlhf("cpo")),
    Case("SimPO", "pairs", _rlhf("simpo")),
    Case("ORPO", "pairs", _rlhf("orpo")),
    Case("KTO", "single", _rlhf("kto")),
    Case("GRPO", "prompts", _rlhf("grpo", **_SAMPLED)),
    Case("SFT", "text", {"command": "sft"}),
)


def _said(prompt: str, *answer: str) -> list[dict[str, str]]:
    turns = zip(("user", "assistant"), (prompt, *answer), strict=False)
    return [{"role": role, "content": text} for role, text in turns]


def prepare(folder: Path, pairs: Pairs) -> None:
    both = 2 * pairs
    rows = {
        "pairs": [
            {"messages": _said(x["prompt"], x["chosen"]), "rejected_response": x["rejected"]}
            for x in pairs
        ],
        "single": [
            {"messages": _said(x["prompt"], x["chosen" if i % 2 else "rejected"])}
            | {"label": bool(i % 2)}
            for i, x in enumerate(both)
        ],
        "prompts": [{"messages": _said(x["prompt"])} for x in both],
        "text": [{"messages": _said(x["prompt"], x["chosen"])} for x in both],
    }
    for name, table in rows.items():
        lines = "\n".join(map(json.dumps, table))
        (folder / f"{name}.jsonl").write_text(lines + "\n")


def arguments(folder: Path, case: Case, out: Path, sizes: Sizes) -> list[str]:
    options = dict(case.options)
    settings = {
        "model": folder / "model",
        "model_type": "qwen2",
        "template": "default",
        "dataset": folder / f"{case.data}.jsonl",
        "max_length": sizes.length,
        "output_dir": out,
        "add_version": "false",
        "tuner_type": "lora" if case.lora else "full",
        "torch_dtype": "float32",
        "per_device_train_batch_size": sizes.pairs * (1 if case.data == "pairs" else 2),
        "gradient_accumulation_steps": 1,
        "max_steps": sizes.steps,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "optim": "sgd",
        "logging_steps": 1,
        "save_steps": sizes.steps,
        "save_only_model": "true",
        "report_to": "none",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "dataloader_num_workers": 0,
        "load_from_cache_file": "false",
    }
    command = options.pop("command")
    given = {**settings, **options}
    return [command, *(str(x) for name, value in given.items() for x in (f"--{name}", value))]


SWIFT = Framework(
    "ms-swift",
    "swift",
    "ms_swift",
    "swift.cli.main",
    CASES,
    prepare,
    arguments,
    {},
)

"""Axolotl: `accelerate launch -m axolotl.cli.train config.yml`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cases import Case, Framework, Pairs, Sizes

_PAIRS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
_SINGLE = {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}
_LORA = {
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    # Its kernels need a GPU.
    **dict.fromkeys((f"lora_{x}_kernel" for x in ("mlp", "qkv", "o", "embedding")), False),
}
_SAMPLED = {
    "use_vllm": False,
    "num_generations": 4,
    "max_completion_length": 128,
    "reward_funcs": ["axolotl_plugin.lengths"],
    "beta": 0.04,
}

CASES = (
    Case("DPO", "pairs", {"rl": "dpo"}),
    Case("DPO, LoRA", "pairs", {"rl": "dpo"}, lora=True),
    Case("ORPO", "talks", {"rl": "orpo", "orpo_alpha": 0.1}),
    Case("SimPO", "pairs", {"rl": "simpo", "simpo_gamma": 0.5}),
    Case("KTO", "single", {"rl": "kto", "remove_unused_columns": False}),
    Case("GRPO", "prompts", {"rl": "grpo", "trl": _SAMPLED}),
    Case("SFT", "text"),
    Case("SFT, LoRA", "text", lora=True),
)
_TYPES = {
    "pairs": {**_PAIRS, "prompt_format": "{prompt}\n"},
    "talks": "chat_template.argilla",
    "single": {**_SINGLE, "prompt_format": "{prompt}\n"},
    "prompts": "axolotl_plugin.prompts",
    "text": "alpaca",
}


def prepare(folder: Path, pairs: Pairs) -> None:
    both = 2 * pairs
    rows = {
        "pairs": pairs,
        "talks": [
            {side: _talk(x["prompt"], x[side]) for side in ("chosen", "rejected")} for x in pairs
        ],
        "single": [
            {"prompt": x["prompt"], "completion": x["chosen" if i % 2 else "rejected"]}
            | {"label": bool(i % 2)}
            for i, x in enumerate(both)
        ],
        "prompts": [{"prompt": x["prompt"]} for x in both],
        "text": [{"instruction": x["prompt"], "input": "", "output": x["chosen"]} for x in both],
    }
    for name, table in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in table))
    shutil.copy(Path(__file__).with_name("axolotl_plugin.py"), folder)


def _talk(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def arguments(folder: Path, case: Case, out: Path, sizes: Sizes) -> list[str]:
    data = {
        "path": str(folder / f"{case.data}.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": _TYPES[case.data],
    }
    two = case.data in ("pairs", "talks")
    settings = {
        "base_model": str(folder / "model"),
        "chat_template": "chatml",
        "datasets": [data],
        "dataset_prepared_path": str(out / "prepared"),
        "dataset_num_proc": 1,
        "val_set_size": 0,
        "sequence_len": sizes.length,
        "output_dir": str(out),
        "micro_batch_size": sizes.pairs * (1 if two else 2),
        "gradient_accumulation_steps": 1,
        "max_steps": sizes.steps,
        "learning_rate": 0.5,
        "lr_scheduler": "constant",
        "optimizer": "sgd",
        "logging_steps": 1,
        "save_steps": sizes.steps,
        "save_only_model": True,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "seed": 0,
        "plugins": ["axolotl_plugin.Seeded"],
        **(_LORA if case.lora else {}),
        **case.options,
    }
    file = out.with_suffix(".yml")  # which JSON is
    file.write_text(json.dumps(settings, indent=1))
    return [str(file)]


AXOLOTL = Framework(
    "Axolotl",
    "axolotl",
    "axolotl",
    "axolotl.cli.train",
    CASES,
    prepare,
    arguments,
    {"AXOLOTL_DO_NOT_TRACK": "1"},
    ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--mixed_precision=no"),
)

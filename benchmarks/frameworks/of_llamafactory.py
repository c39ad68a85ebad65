"""LLaMA-Factory: `llamafactory-cli train config.yaml`."""

from __future__ import annotations

import json
from pathlib import Path

from cases import Case, Framework, Pairs, Sizes

_COLUMNS = {"prompt": "instruction", "response": "output"}
_TABLES = {
    "pairs": {"ranking": True, "columns": {**_COLUMNS, "chosen": "chosen", "rejected": "rejected"}},
    "single": {"columns": {**_COLUMNS, "kto_tag": "good"}},
    "text": {"columns": _COLUMNS},
}
_LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}


def _dpo(loss: str) -> dict[str, str]:
    return {"stage": "dpo", "pref_loss": loss}


CASES = (
    Case("DPO", "pairs", _dpo("sigmoid")),
    Case("DPO, LoRA", "pairs", _dpo("sigmoid"), lora=True),
    Case("ORPO", "pairs", _dpo("orpo")),
    Case("SimPO", "pairs", _dpo("simpo")),
    Case("KTO", "single", {"stage": "kto"}),
    Case("KTO, LoRA", "single", {"stage": "kto"}, lora=True),
    Case("SFT", "text", {"stage": "sft"}),
    Case("SFT, LoRA", "text", {"stage": "sft"}, lora=True),
)


def prepare(folder: Path, pairs: Pairs) -> None:
    rows = {
        "pairs": [{"instruction": x.pop("prompt"), "output": "", **x} for x in map(dict, pairs)],
        "single": [
            {"instruction": x["prompt"], "output": x["chosen" if i % 2 else "rejected"]}
            | {"good": bool(i % 2)}
            for i, x in enumerate(2 * pairs)
        ],
        "text": [{"instruction": x["prompt"], "output": x["chosen"]} for x in 2 * pairs],
    }
    for name, table in rows.items():
        (folder / f"{name}_rows.json").write_text(json.dumps(table))
    known = {name: {"file_name": f"{name}_rows.json", **how} for name, how in _TABLES.items()}
    (folder / "dataset_info.json").write_text(json.dumps(known))


def arguments(folder: Path, case: Case, out: Path, sizes: Sizes) -> list[str]:
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "dataset": case.data,
        "template": "default",
        "cutoff_len": sizes.length,
        "output_dir": str(out),
        "do_train": True,
        "finetuning_type": "full",
        "per_device_train_batch_size": sizes.pairs * (1 if case.data == "pairs" else 2),
        "gradient_accumulation_steps": 1,
        "max_steps": sizes.steps,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
        **(_LORA if case.lora else {}),
        **case.options,
    }
    file = out.with_suffix(".yaml")  # which JSON is
    file.write_text(json.dumps(settings, indent=1))
    return ["train", str(file)]


LLAMAFACTORY = Framework(
    "LLaMA-Factory",
    "llamafactory",
    "llamafactory",
    "llamafactory.cli",
    CASES,
    prepare,
    arguments,
    {},
)

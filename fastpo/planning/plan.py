"""`plan_step`: what a step costs with TRL's head and with fastpo's, and what fits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import measure as real
from .cards import memory_of
from .data import Lengths, read_lengths
from .estimate import Estimate
from .fits import Depths, check_runs
from .given import check_sizes, read_config
from .names import LOGITS, SAMPLES
from .setting import Lora, Setting, of_ratio


@dataclass(frozen=True)
class Head:
    """One head's step, and the largest that fit. measured, where asked: bytes of a real step, or
    "out of memory"."""

    estimate: Estimate
    context: Estimate | None = None
    batch: Estimate | None = None
    measured: int | str | None = None


@dataclass(frozen=True)
class StepPlan:
    """`print` it for a table; `settings` is what to paste into a script."""

    setting: Setting
    heads: dict[str, Head]
    lengths: Lengths | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool | None:
        memory = self.setting.memory
        return None if memory is None else self.heads["fastpo"].estimate.peak <= memory

    def as_json(self) -> str:
        heads = {name: _of_head(head) for name, head in self.heads.items()}
        lengths = None if self.lengths is None else asdict(self.lengths)
        found: dict[str, Any] = {
            "setting": asdict(self.setting),
            "heads": heads,
            "lengths": lengths,
        }
        found |= {"fits": self.fits, "notes": self.notes, "settings": self.settings}
        return json.dumps(found, indent=2, default=str)

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of the trainer's config."""
        setting = self.setting
        found: dict[str, Any] = {"max_length": setting.context}
        if setting.trainer in SAMPLES:
            found = {"max_completion_length": setting.scored + 1}
        found["per_device_train_batch_size"] = setting.batch
        found["gradient_checkpointing"] = setting.checkpointing != "none"
        if setting.checkpointing == "offload":
            found["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "offload": True}
        names = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit"}
        found["optim"] = names.get(setting.optimizer, setting.optimizer)
        found["bf16"] = setting.dtype == "bf16-mixed"
        if setting.dtype in ("bf16", "fp16"):
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[setting.dtype]
            found["model_init_kwargs"] = {"dtype": dtype}
        if setting.attention == "flash":
            found.setdefault("model_init_kwargs", {})["attn_implementation"] = "flash_attention_2"
        if setting.reference == "precomputed":
            found["precompute_ref_log_probs"] = True
        if setting.teacher is not None:
            found["teacher_model_name_or_path"] = str(setting.teacher)
        return found

    def __str__(self) -> str:
        from .table import table

        return table(self)


def _of_head(head: Head) -> dict[str, Any]:
    def largest(found: Estimate | None, what: str) -> dict[str, int] | None:
        if found is None:
            return None
        return {what: getattr(found.setting, what), "bytes": found.peak}

    own = head.estimate
    return {
        "bytes": own.peak,
        "parts": own.parts,
        "phases": own.phases,
        "context": largest(head.context, "context"),
        "batch": largest(head.batch, "batch"),
        "measured": head.measured,
    }


def plan_step(
    model: str | Path | Any,
    *,
    gpu: str | None = None,
    teacher: str | Path | Any = None,
    lora: str | Lora | None = None,
    shared_prompts: str | None = None,
    data: str | Path | None = None,
    search: bool = True,
    measure: bool = False,
    **options: Any,
) -> StepPlan:
    """Memory of one training step, told by running it on tensors that hold nothing.

    model: a folder or `config.json` that transformers knows, or a config; nothing is downloaded and
        no code of the model's own runs.
    teacher: of `gkd` and `distillation`, given as the model is; None: one as large as the model.
    gpu: a card (`h100`, `4090`) or a size (`80GiB`); None says what a step costs, not what fits.
    lora: `r=16,targets=q_proj+v_proj`; "all-linear" are the targets where none are named.
    data: a JSONL or JSON file of prompt, chosen, rejected (or completion, or text) whose lengths
        give context and share of the prompt; words are counted by the folder's tokenizer.
    shared_prompts: fastpo computes prompts once. `4:1` is how many tokens of a prompt there are to
        those of an answer, `4:1,8` has 8 rows of each (else 2 of a pair, 8 of GRPO and RLOO); ""
        takes the prompt's share as it is.
    search: also the longest context and the largest batch, each with the other as given.
    measure: also run the real step and give what it held, or that memory did not suffice: on the
        GPU, which must be there, or for `device="cpu"` on the CPU in a process of its own.
    options: fields of `Setting`: trainer, dtype, device, context, batch, prompt, load_in_4bit,
        optimizer, attention, checkpointing, reference, budget, devices, strategy, prompt_rows.

    What no tensor shows is added for a GPU: 500 MiB of the driver, 64 MiB of library workspaces,
    5 % of what comes and goes for the allocator; DDP's buckets; what FSDP2 and ZeRO-3
    have whole at once: all but the layers, the layer at work and the next one, their gradients.

    Raises ValueError for an unknown model, card, option, or a config that needs remote code.
    """
    memory = None if gpu is None else memory_of(gpu)
    config = read_config(model) if isinstance(model, str | Path) else model
    lengths = None if data is None else read_lengths(Path(data), model)
    if shared_prompts is not None:
        options = _joined(of_ratio(shared_prompts, options.get("trainer", "dpo")), options)
    if lengths is not None:
        options = {"context": lengths.context, "prompt": lengths.prompt_share, **options}
    name = model if isinstance(model, str | Path) else type(config).__name__
    if teacher is not None:
        options["teacher"] = teacher if isinstance(teacher, str | Path) else type(teacher).__name__
    parsed = Lora.parse(lora) if isinstance(lora, str) else lora
    setting = Setting(name, memory=memory, lora=parsed, **options)
    taught = read_config(teacher, "teacher") if isinstance(teacher, str | Path) else teacher
    for what, each in (("model", config), ("teacher", taught)):
        if each is not None:
            check_sizes(each, what)
            check_runs(setting, each, what)
    if measure:
        real.check(setting)  # before a search
    heads = {
        head: _head(setting, (config, taught), head, search, measure) for head in setting.heads
    }
    return StepPlan(setting, heads, lengths, _notes(setting))


def _joined(shared: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    twice = min(set(shared) & set(options), default=None)
    if twice is not None:
        got = options[twice]
        raise ValueError(f"{twice}: expected none beside that of shared_prompts, got {got}")
    return {**shared, **options}


def _head(
    setting: Setting, configs: tuple[Any, Any], head: str, search: bool, measure: bool
) -> Head:
    """configs: of the model and of its teacher."""
    config, teacher = configs
    depths = Depths(setting, config, head, teacher)
    found = {}
    if search and setting.memory is not None:
        found = {what: depths.largest(what, setting.memory) for what in ("context", "batch")}
    measured = real.measure(setting, config, head, teacher) if measure else None
    return Head(depths.estimate(), **found, measured=measured)


def _notes(setting: Setting) -> tuple[str, ...]:
    notes = []
    if setting.trainer in LOGITS:
        notes.append(f"TRL's {setting.trainer.upper()} trainer builds the logits of all positions")
    if setting.load_in_4bit:
        notes.append(
            "in 4 bits by BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
            "bnb_4bit_use_double_quant=True) as quantization_config"
        )
    if setting.prompt_rows > 1:
        notes.append("prompts are computed once by fastpo.patch(shared_prompts=True)")
    if setting.checkpointing == "offload":
        notes.append("what layers keep lies in host memory, which is not counted here")
    return tuple(notes)

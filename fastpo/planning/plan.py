"""`plan_step`: what a step costs with TRL's head and with fastpo's, and what fits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..ops.walks.checks import check_flag
from . import measure as real
from .cards import memory_of
from .data import Lengths, read_lengths
from .estimate import Estimate
from .fits import Depths, check_runs, cut, depths
from .given import check_sizes, read_config
from .models import build, draws, towers
from .names import GENERATIONS, LOGITS, SAMPLES
from .setting import HEADS, Lora, Setting, of_ratio

_OPTIONS = {x.name for x in fields(Setting)} - {"model", "teacher", "memory", "lora"}


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
    """`print` it for a table; `settings` is what to paste into a script.

    heads: "trl" and "fastpo"; of each `estimate.peak` in bytes, `estimate.parts`, and with a card
        `context` and `batch`, the largest steps that fit, or None.
    lengths: of the rows of `data`.  fits: of fastpo's step; None without a card.
    """

    setting: Setting
    heads: dict[str, Head]
    lengths: Lengths | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool | None:
        memory = self.setting.memory
        return None if memory is None else self.heads["fastpo"].estimate.peak <= memory

    def as_json(self) -> str:
        """What `fastpo plan --json` writes; sizes in bytes."""
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
            found = {"max_completion_length": setting.scored}
        found["per_device_train_batch_size"] = setting.batch
        if setting.trainer in GENERATIONS:
            found |= _groups(setting)
        found["gradient_checkpointing"] = setting.checkpointing != "none"
        if setting.checkpointing == "offload":
            found["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "offload": True}
        names = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit"}
        found["optim"] = names.get(setting.optimizer, setting.optimizer)
        found["bf16"] = setting.dtype == "bf16-mixed"
        found["model_init_kwargs"] = _loaded(setting)
        if setting.reference == "precomputed":
            found["precompute_ref_log_probs"] = True
        if setting.teacher is not None:
            found["teacher_model_name_or_path"] = str(setting.teacher)
        if setting.distils:
            found["teacher_model_init_kwargs"] = _loaded(setting)
        return found

    def __str__(self) -> str:
        from .table import table

        return table(self)


def _groups(setting: Setting) -> dict[str, Any]:
    """Whole groups of a prompt, over several steps where a batch has none."""
    rows = setting.prompt_rows if setting.prompt_rows > 1 else GENERATIONS[setting.trainer]
    found: dict[str, Any] = {"num_generations": rows}
    steps = rows // math.gcd(rows, setting.batch * setting.devices)
    if steps > 1:
        found["steps_per_generation"] = steps
    if setting.trainer == "rloo" and setting.other == "none":
        found["beta"] = 0.0
    return found


def _loaded(setting: Setting) -> dict[str, str]:
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(setting.dtype, "float32")
    flash = {"attn_implementation": "flash_attention_2"} if setting.attention == "flash" else {}
    return {"dtype": dtype, **flash}


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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever the caller has tensors made on, and whether gradients are wanted there."""
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        yield


@_undisturbed()
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
    data: a JSONL, JSON or Parquet file of prompt, chosen, rejected (or completion, text, messages)
        whose lengths give context and share of the prompt; the folder's tokenizer counts tokens.
    shared_prompts: fastpo computes prompts once. `4:1` is how many tokens of a prompt there are to
        those of an answer, `4:1,8` has 8 rows of each (else 2 of a pair and of RLOO, 8 of GRPO;
        other trainers have no number of their own);
        "" takes the prompt's share as it is.
    search: also the longest context and the largest batch, each with the other as given.
    measure: also run the real step and give what it held, or that memory did not suffice: on the
        GPU, which must be there, or for `device="cpu"` on the CPU in a process of its own.
    options: fields of `Setting`: trainer, dtype, device, context, batch, prompt, load_in_4bit,
        optimizer, attention, checkpointing, reference, budget, devices, strategy, prompt_rows.
        batch is 1 by default, of GRPO and RLOO the rows of a prompt.

    What no tensor shows is added for a GPU: 500 MiB of the driver, 64 MiB of library workspaces,
    5 % of what comes and goes for the allocator; DDP's buckets; what FSDP2 and ZeRO-3
    have whole at once: all but the layers, the layer at work and the next one, their gradients.

    Raises ValueError for an unknown model, card, option, a config that needs remote code, or a
    context of more positions than the model has a table for.
    """
    for option in options.keys() - _OPTIONS:
        raise ValueError(f"options: expected some of {', '.join(sorted(_OPTIONS))}, got {option!r}")
    check_flag("search", search)
    check_flag("measure", measure)
    memory = None if gpu is None else memory_of(gpu)
    if data is not None and not isinstance(data, str | Path):
        raise ValueError(f"data: expected a path of a file, got {data!r}")
    config = read_config(model)
    lengths = None if data is None else read_lengths(Path(data), model)
    if shared_prompts is not None:
        options = _joined(of_ratio(shared_prompts, str(options.get("trainer", "dpo"))), options)
    if lengths is not None:
        options = {"context": lengths.context, "prompt": lengths.prompt_share, **options}
    options = {"batch": _batch(options), **options}
    name = model if isinstance(model, str | Path) else type(config).__name__
    if teacher is not None:
        options["teacher"] = teacher if isinstance(teacher, str | Path) else type(teacher).__name__
    parsed = lora if lora is None or isinstance(lora, Lora) else Lora.parse(str(lora))
    setting = Setting(name, memory=memory, lora=parsed, **options)
    taught = None if teacher is None else read_config(teacher, "teacher")
    for what, each in (("model", config), ("teacher", taught)):
        if each is not None:
            check_sizes(each, what)
            check_runs(setting, each, what)
    if measure:
        real.check(setting)  # before a search
    heads = {head: _head(setting, (config, taught), head, search, measure) for head in HEADS}
    notes = (*_notes(setting, config), *_notes_of(config, "model", setting, heads))
    if taught is not None:
        notes += (*_notes_of(taught, "teacher", setting, heads),)
    return StepPlan(setting, heads, lengths, notes)


def _batch(options: dict[str, Any]) -> Any:
    """A whole group where a trainer samples several answers to a prompt."""
    rows = GENERATIONS.get(str(options.get("trainer", "dpo")))
    return 1 if rows is None else options.get("prompt_rows", rows)


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


def _notes(setting: Setting, config: Any) -> tuple[str, ...]:
    notes = []
    with torch.device("meta"):
        models = build(setting, cut(config, depths(setting, config)[0]))
    if towers(models.base.config):
        notes.append(
            "planned on text: of towers for pictures or sounds the weights are counted, trained as "
            "the rest, but not what they compute"
        )
    if setting.trainer in LOGITS:
        notes.append(f"TRL's {setting.trainer.upper()} trainer builds the logits of all positions")
    if setting.load_in_4bit:
        notes.append(
            "in 4 bits by BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
            "bnb_4bit_use_double_quant=True, "
            f"bnb_4bit_compute_dtype={_loaded(setting)['dtype']!r}) as quantization_config"
        )
    if setting.prompt_rows > 1:
        notes.append("prompts are computed once by fastpo.patch(shared_prompts=True)")
        if draws(models.policy):
            notes[-1] += ", but for the policy: its dropout is drawn for every row"
    if setting.checkpointing == "offload":
        notes.append("what layers keep lies in host memory, which is not counted here")
    if setting.strategy != "ddp" and setting.devices == 1:
        notes.append(f"{setting.strategy} has nothing to divide with devices=1, the default")
    if setting.trainer == "grpo" and setting.other != "none":
        notes.append("GRPO scores a reference with beta > 0 only")
    return tuple(notes)


def _notes_of(config: Any, name: str, setting: Setting, heads: dict[str, Head]) -> Iterator[str]:
    found = [x.context.setting.context for x in heads.values() if x.context is not None]
    longest, text = max([setting.context, *found]), config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and longest > most:
        yield f"{longest:,} tokens are more than the {name}'s max_position_embeddings, {most:,}"
    if getattr(config, "quantization_config", None) is not None:
        yield f"the {name}'s quantization_config is left out: planned in {setting.dtype}"

"""TRL's trainers with every prompt computed once: the same losses, metrics and parameters."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import test_trl_distillation
import test_trl_experimental
import torch
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.sharing import attention, backbone


@pytest.fixture
def layouts(monkeypatch):
    """Of every batch that was packed. Prompts of these tests are short: anything is worth it."""
    seen, packed = [], backbone.Packer.packed
    monkeypatch.setattr(backbone, "_LEAST", 1)
    monkeypatch.setattr(backbone, "is_worth", lambda *_: True)

    def noted(self, own, inputs, layout):
        if self.known:
            seen.append(layout)
        return packed(self, own, inputs, layout)

    monkeypatch.setattr(backbone.Packer, "packed", noted)
    yield seen
    attention.restore()


@dataclass(frozen=True)
class Case:
    prefix: str
    changes: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    model: str = "llama"

    def build(self, folder):
        given: dict[str, Any] = {"peft_config": _trainers.lora()} if self.lora else {}
        changes = dict(self.changes)
        if self.prefix in ("GRPO", "RLOO"):
            given["reward_funcs"] = _trainers.reward
            changes |= {"max_completion_length": 4, "num_generations": 2}
        path = _trainers.saved(folder, self.model)
        data = _trainers.DATA[self.prefix]()
        return _trainers.build(self.prefix, folder, path, data, changes, **given)


CASES = {
    "dpo": Case("DPO"),
    "dpo_lora": Case("DPO", lora=True),
    "dpo_precomputed": Case("DPO", {"precompute_ref_log_probs": True}),
    "dpo_checkpointed": Case("DPO", {"gradient_checkpointing": True}),
    "dpo_reentrant": Case(
        "DPO",
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
    "dpo_accumulated": Case("DPO", {"gradient_accumulation_steps": 2}),
    "dpo_mixtral": Case("DPO", model="mixtral"),
    "dpo_gemma3": Case("DPO", model="gemma3"),
    "kto": Case("KTO"),
    "sft": Case("SFT"),
    "grpo": Case("GRPO", {"beta": 0.1}),
    "rloo": Case("RLOO"),
}
READERS = ("cpo", "cpo_moe", "cpo_lora", "orpo", "tpo", "a2po", "online_dpo", "sft_smoothed", "gkd")


def assert_trains_the_same(make, layouts, **options):
    runs = []
    for shared in (False, True):
        layouts.clear()
        patched = fastpo.patched(**options) if shared else contextlib.nullcontext()
        with patched:
            runs.append(_trainers.train(make()))
        assert bool(layouts) == shared
    for logs, _ in runs:
        for log in logs:  # means over all positions, those of pads, too
            for name in ("logits/chosen", "logits/rejected"):
                log.pop(name, None)
    _trainers.assert_same(runs[1], runs[0])


@pytest.mark.parametrize("name", CASES)
def test_on_the_fused_head(name, tmp_path, layouts):
    assert_trains_the_same(lambda: CASES[name].build(tmp_path), layouts, shared_prompts=True)
    assert any(row.shared for layout in layouts for row in layout.rows)


@pytest.mark.parametrize("name", READERS)
def test_where_logits_are_read(name, tmp_path, layouts):
    home = test_trl_distillation if name == "gkd" else test_trl_experimental
    assert_trains_the_same(lambda: home.trainer(name, tmp_path), layouts, shared_prompts=True)


def test_padding_alone_can_go(tmp_path, layouts):
    assert_trains_the_same(lambda: CASES["dpo"].build(tmp_path), layouts, padding_free=True)
    assert not any(row.shared for layout in layouts for row in layout.rows)
    assert any(layout.size < layout.shape[0] * layout.shape[1] for layout in layouts)


def test_dropout_is_drawn_for_every_row(tmp_path, layouts):
    """GRPO keeps the model's: what is computed once would be dropped once."""
    model = tiny.model("llama", attention_dropout=0.1)
    with fastpo.patched(shared_prompts=True):
        settings = {"max_completion_length": 4, "num_generations": 2}
        reward = {"reward_funcs": _trainers.reward}
        data = tiny.prompts()
        _trainers.build("GRPO", tmp_path, model, data, settings, **reward).train()
    assert layouts and not any(row.shared for layout in layouts for row in layout.rows)


def test_metrics_of_logits_are_those_of_scored_tokens_in_dpo(tmp_path, layouts):
    logs = []
    for shared in (False, True):
        with fastpo.patched(shared_prompts=shared):
            logs.append(_trainers.train(CASES["dpo"].build(tmp_path))[0][0])
    assert logs[1]["logits/chosen"] == pytest.approx(logs[0]["logits/chosen"], rel=1e-4)


def test_without_the_patch_nothing_is_packed(tmp_path, layouts):
    with fastpo.patched(shared_prompts=True):
        trainer = CASES["dpo"].build(tmp_path)
    layouts.clear()
    with torch.no_grad():
        trainer.model(**{k: v for k, v in tiny.batch().items() if k != "labels"})
    assert not layouts

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
    lora: dict[str, Any] | None = None
    model: str = "llama"

    def build(self, folder):
        given: dict[str, Any] = {}
        if self.lora is not None:
            given["peft_config"] = _trainers.lora(**self.lora)
        changes = dict(self.changes)
        if self.prefix in ("GRPO", "RLOO"):
            given["reward_funcs"] = _trainers.reward
            changes |= {"max_completion_length": 4, "num_generations": 2}
        path = _trainers.saved(folder, self.model)
        data = _trainers.DATA[self.prefix]()
        return _trainers.build(self.prefix, folder, path, data, changes, **given)


CASES = {
    "dpo": Case("DPO"),
    "dpo_lora": Case("DPO", lora={}),
    "dpo_dora": Case("DPO", lora={"use_dora": True}),
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
# Means over all positions, those of pads, too, in CPO and ORPO.
PADS = ("logits/chosen", "logits/rejected")
READERS = ("cpo", "cpo_moe", "cpo_lora", "orpo", "tpo", "a2po", "online_dpo", "sft_smoothed")
TAUGHT = ("distillation", "gkd", "gold")


def assert_trains_the_same(make, layouts, **options):
    runs = []
    for shared in (False, True):
        layouts.clear()
        patched = fastpo.patched(**options) if shared else contextlib.nullcontext()
        with patched:
            runs.append(_trainers.train(make()))
        assert bool(layouts) == shared
    for name in PADS:
        assert all(name in log for log in runs[0][0]) == all(name in log for log in runs[1][0])
    saved = [log.pop("fastpo/tokens_saved", None) for log in runs[1][0]]
    assert all(0 < x < 1 for x in saved[:-1]) and saved[-1] is None  # of the whole run: timings
    for logs, _ in runs:
        for log in logs:
            for name in PADS:
                log.pop(name, None)
    _trainers.assert_same(runs[1], runs[0])


@pytest.mark.parametrize("name", CASES)
def test_on_the_fused_head(name, tmp_path, layouts):
    assert_trains_the_same(lambda: CASES[name].build(tmp_path), layouts, shared_prompts=True)
    assert any(row.shared for layout in layouts for row in layout.rows)


@pytest.mark.parametrize("name", READERS)
def test_where_logits_are_read(name, tmp_path, layouts):
    make = lambda: test_trl_experimental.trainer(name, tmp_path)  # noqa: E731
    assert_trains_the_same(make, layouts, shared_prompts=True)


@pytest.mark.parametrize("name", TAUGHT)
def test_student_and_teacher(name, tmp_path, layouts):
    made = []
    make = lambda: made.append(test_trl_distillation.trainer(name, tmp_path)) or made[-1]  # noqa: E731
    assert_trains_the_same(make, layouts, shared_prompts=True)
    assert len(layouts) == 6, "two models, three steps"
    assert not backbone.take_tokens([made[-1].teacher_model]).padded, "the log has them"


@pytest.mark.parametrize("share", [True, False])
def test_student_and_teacher_without_padding_alone(share, tmp_path, layouts):
    options = {"shared_prompts" if share else "padding_free": True}
    with fastpo.patched(**options):
        trainer = test_trl_distillation.trainer("distillation", tmp_path)
        trainer.train()
    packers = backbone._packers_of([trainer.model, trainer.teacher_model])
    assert [packer.share for packer in packers] == [share, share] and layouts


def test_tokens_of_the_reference_are_in_the_log(tmp_path, layouts):
    with fastpo.patched(shared_prompts=True):
        trainer = CASES["dpo"].build(tmp_path)
        trainer.train()
    assert len(layouts) > 1 and trainer.ref_model is not None
    assert not backbone.take_tokens([trainer.model, trainer.ref_model]).padded


def earlier():
    return {"history": [tiny.model(seed=2), tiny.model(seed=3)]}


# The objective's options, whether each row has a third text, and calls of backbones in a step.
OBJECTIVES = {
    "simpo": ({}, False, 1),
    "vpo": ({}, True, 2),
    "mrpo": ({"references": earlier}, False, 3),
}


@pytest.mark.parametrize("key", OBJECTIVES)
def test_objectives_by_name(key, tmp_path, layouts):
    pytest.importorskip("trl", minversion="1.15")  # the first with objectives of fastpo's
    given, third, expected = OBJECTIVES[key]
    data = tiny.preferences()
    if third:
        texts = [[{"role": "assistant", "content": text}] for text in tiny.GOOD[::-1]]
        data = data.add_column("third", texts)
    runs, calls = [], []
    for shared in (False, True):
        layouts.clear()
        options = {name: make() for name, make in given.items()}
        with fastpo.patched(objective=key, shared_prompts=shared, **options):
            path = _trainers.saved(tmp_path)
            logs, parameters = _trainers.train(_trainers.build("DPO", tmp_path, path, data, {}))
        calls.append(len(layouts))
        kept = [{k: v for k, v in log.items() if "fastpo" not in k} for log in logs]
        runs.append((kept, parameters))
    _trainers.assert_same(*reversed(runs))
    assert calls == [0, 3 * expected]


def test_groups_of_completions(tmp_path, layouts):
    """Groups of 3, 1 and 2."""
    groups = pytest.importorskip("test_group_trainer")
    runs = []
    for shared in (False, True):
        layouts.clear()
        with fastpo.patched(shared_prompts=shared):
            logs, parameters = _trainers.train(groups.trainer(tmp_path, "infonca"))
        kept = [{k: v for k, v in log.items() if "fastpo" not in k} for log in logs]
        runs.append((kept, parameters))
        assert bool(layouts) == shared
    _trainers.assert_same(*reversed(runs))
    assert max(len(layout.rows) for layout in layouts) >= 3


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


def test_tokens_are_counted_from_log_to_log(tmp_path, layouts):
    with fastpo.patched(shared_prompts=True):
        trainer = CASES["dpo"].build(tmp_path)
        trainer.args.logging_steps, trainer.args.max_steps = 2, 4
        trainer.eval_dataset = trainer.train_dataset
        logs, _ = _trainers.train(trainer)
        saved = [log["fastpo/tokens_saved"] for log in logs[:2]]
        sizes = [(layout.size, layout.shape[0] * layout.shape[1]) for layout in layouts]
        half = len(sizes) // 2  # policy and reference, two steps each
        for part, found in zip((sizes[:half], sizes[half:]), saved, strict=True):
            assert found == pytest.approx(1 - sum(x for x, _ in part) / sum(y for _, y in part))
        for prefix in ("eval", "test"):
            assert trainer.evaluate(metric_key_prefix=prefix)[f"{prefix}_loss"] > 0
            found = {k: x for k, x in trainer.state.log_history[-1].items() if "fastpo" in k}
            assert list(found) == ["eval_fastpo/tokens_saved"] and 0 < sum(found.values()) < 1
    with fastpo.patched():
        assert not any(
            "fastpo" in name for name in _trainers.train(CASES["dpo"].build(tmp_path))[0][0]
        )


@pytest.mark.parametrize("prefix", ["GRPO", "RLOO"])
def test_groups_stay_together(prefix, tmp_path, layouts):
    """Every batch holds one prompt, and the step is that of completions shuffled one by one."""
    runs, prompts = [], []
    settings = {"num_generations": 2, "gradient_accumulation_steps": 3, "max_steps": 1}
    settings |= {"max_completion_length": 4, "beta": 0.1}
    for whole in (False, True):
        layouts.clear()
        with fastpo.patched(shared_prompts=True, whole_groups=whole):
            trainer = _trainers.build(
                prefix,
                tmp_path,
                _trainers.saved(tmp_path),
                tiny.prompts(),
                settings,
                reward_funcs=_trainers.reward,
            )
            runs.append(_trainers.train(trainer))
        prompts.append([sum(not row.shared for row in layout.rows) for layout in layouts])
    for logs, _ in runs:
        logs[0].pop("fastpo/tokens_saved")
    _trainers.assert_same(runs[1], runs[0])
    assert set(prompts[1]) == {1} and 2 in prompts[0]


def test_whole_groups_are_of_shared_prompts():
    with pytest.raises(ValueError, match="whole_groups: expected shared_prompts=True with it"):
        fastpo.patch(whole_groups=True)


def test_everything_of_a_group_moves_with_it():
    rows = {
        "prompt_ids": torch.tensor([[2], [2], [1], [3], [3], [3]]),
        "nothing": None,
        "number": torch.tensor(3.0),
        "texts": list("aabccc"),
        "numbers": torch.arange(6),
    }
    with fastpo.patched(shared_prompts=True, whole_groups=True):
        from trl.trainer import grpo_trainer

        torch.manual_seed(1)
        found = grpo_trainer.shuffle_sequence_dict(rows)
    assert found["nothing"] is None and found["number"] == 3
    order = found["numbers"].tolist()
    assert order != sorted(order) and [x for x in order if x < 2] == [0, 1]
    assert "".join(found["texts"]) == "".join(rows["texts"][i] for i in order)
    assert found["prompt_ids"].equal(rows["prompt_ids"][order])
    assert [x for x in order if x > 2] == [3, 4, 5]


def test_a_second_patch_replaces_the_first():
    import transformers

    own = vars(transformers.Trainer)["log"]
    with fastpo.patched(shared_prompts=True, whole_groups=True):
        assert vars(transformers.Trainer)["log"] is not own
        fastpo.patch()
        assert vars(transformers.Trainer)["log"] is own
    assert vars(transformers.Trainer)["log"] is own


def test_an_adapter_for_the_reference(tmp_path, layouts):
    """A trained adapter goes on: TRL keeps its first state as the adapter "ref"."""
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny.model(), _trainers.lora(init_lora_weights=False))
        return _trainers.build("DPO", tmp_path, model, tiny.preferences(), {})

    assert "ref" in make().model.peft_config
    assert_trains_the_same(make, layouts, shared_prompts=True)


def test_evaluation_between_steps(tmp_path, layouts):
    def make():
        trainer = CASES["dpo"].build(tmp_path)
        trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
        trainer.eval_dataset = trainer.train_dataset
        return trainer

    runs = []
    for shared in (False, True):
        with fastpo.patched(shared_prompts=shared):
            logs, parameters = _trainers.train(make())
        keys = [{k: v for k, v in log.items() if "fastpo" not in k} for log in logs]
        runs.append((keys, parameters))
    assert any("eval_loss" in log for log in runs[1][0])
    _trainers.assert_same(*reversed(runs))


def test_tokens_of_an_evaluation_count_apart(tmp_path, layouts):
    """It comes between two logs of the training: those are what they were, and it is its own."""
    saved = []
    for every in (6, 2):  # after the last log, and between
        with fastpo.patched(shared_prompts=True):
            trainer = CASES["dpo"].build(tmp_path)
            trainer.args.logging_steps, trainer.args.max_steps = 3, 6
            trainer.args.eval_strategy, trainer.args.eval_steps = "steps", every
            trainer.eval_dataset = trainer.train_dataset.select(range(1))
            logs, _ = _trainers.train(trainer)
        for name in ("fastpo/tokens_saved", "eval_fastpo/tokens_saved"):
            saved.append([log[name] for log in logs if name in log])
    assert saved[0] == saved[2] and len(saved[0]) == 2
    assert len(saved[1]) == 1 and saved[3] == saved[1] * 3


def test_without_the_patch_nothing_is_packed(tmp_path, layouts):
    with fastpo.patched(shared_prompts=True):
        trainer = CASES["dpo"].build(tmp_path)
    layouts.clear()
    with torch.no_grad():
        trainer.model(**{k: v for k, v in tiny.batch().items() if k != "labels"})
    logs, _ = _trainers.train(trainer)
    assert not layouts and not any("fastpo/tokens_saved" in log for log in logs)


@pytest.mark.parametrize("name", ["cpo", "orpo", "distillation"])
def test_a_compiled_model(name, tmp_path, layouts, monkeypatch):
    """accelerate leaves the compiler's wrapper on, for a trainer that reads logits."""
    own, compiled = _trainers.config, {"torch_compile": True, "torch_compile_backend": "eager"}
    monkeypatch.setattr(_trainers, "config", lambda *given: own(*given[:2], given[2] | compiled))
    home = test_trl_distillation if name in TAUGHT else test_trl_experimental
    assert_trains_the_same(lambda: home.trainer(name, tmp_path), layouts, shared_prompts=True)

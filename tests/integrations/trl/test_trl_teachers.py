"""TRL's trainers whose teacher is a server, a model beside, or the student itself.

Built and run as a script would: the same losses, metrics and parameters with the patch as without,
and no tensor wider than a tile.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _tiny import one_thread  # noqa: F401
from datasets import Dataset
from test_trl_options import HIDDEN, TILE, WORDS, path, small_tiles, trained, widest  # noqa: F401
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.generation import vllm_client

import fastpo
from fastpo.integrations.lazy import cell
from fastpo.integrations.trl import gold

FEWER = 15_000  # words of a teacher with a tokenizer of its own


def teacher() -> Any:
    return tiny.model("llama", seed=1, vocab_size=WORDS)


class Server(vllm_client.VLLMClient):
    """TRL's client, its requests answered by a model of this process as vLLM's server would."""

    model = "teacher"

    def __init__(self, base_url: str, connection_timeout: float) -> None:
        self.base_url, self.scorer = base_url, teacher()

    def _post(self, url: str, **kwargs: Any) -> Any:
        assert url == f"{self.base_url}/v1/completions"
        request = json.loads(json.dumps(kwargs["json"]))
        choices = [self.scored(ids, request) for ids in request["prompt"]]
        return json.loads(json.dumps({"choices": choices}))

    @torch.no_grad()
    def scored(self, ids: list[int], request: dict[str, Any]) -> dict[str, Any]:
        """Of every position but the first the best words, and the one that stands there."""
        logits = self.scorer(torch.tensor([ids])).logits[0, :-1]
        logps = (logits / request["temperature"]).log_softmax(-1)
        found: list[Any] = [None]
        for row, word in zip(logps, ids[1:], strict=True):
            best = row.topk(request["prompt_logprobs"]).indices.tolist()
            ranks = {w: i + 1 for i, w in enumerate(best)}
            ranks.setdefault(word, int((row > row[word]).sum()) + 1)
            found.append({w: {"logprob": row[w].item(), "rank": r} for w, r in ranks.items()})
        return {"prompt_logprobs": found}


def demonstrations() -> Dataset:
    rows = zip(tiny.prompts(), tiny.GOOD, strict=True)
    return Dataset.from_list([{**row, "privileged_context": good} for row, good in rows])


@dataclass(frozen=True)
class Taught:
    prefix: str  # TRL's: GKD for GKDTrainer and GKDConfig
    data: Callable[[], Dataset]
    changes: dict[str, Any] = field(default_factory=dict)  # of the config
    lora: bool = False
    evaluated: bool = False  # without metrics of its own: nobody reads logits
    words: int = 0  # of a teacher's own tokenizer
    run: int = 1  # longest run of tokens of one that end where the other's do

    def build(self, folder: Path, model: Path) -> Any:
        given: dict[str, Any] = {}
        if self.prefix == "SDPO":
            given["reward_funcs"] = _trainers.reward
        if self.prefix == "IWOPD":  # reads the tokenizer from where the teacher was loaded
            given["teacher_model"] = teacher()
            given["teacher_model"].config._name_or_path = str(folder / "teacher")
            tiny.tokenizer().save_pretrained(folder / "teacher")
        changes = {"max_completion_length": 4, **self.changes}
        if self.words:
            given["teacher_model"] = tiny.model("llama", seed=1, vocab_size=FEWER)
            changes["teacher_tokenizer_name_or_path"] = str(folder / "teacher")
            tiny.tokenizer(self.words).save_pretrained(folder / "teacher")
        if self.lora:
            given["peft_config"] = _trainers.lora()
        rows = self.data()
        if self.evaluated:
            given["eval_dataset"] = rows.select(range(2))
            changes |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
        return _trainers.build(self.prefix, folder, str(model), rows, changes, **given)


# A low temperature: among 20,000 words the best few would hardly weigh anything.
SERVED = {"teacher_model_server_url": "http://teacher", "temperature": 0.3}
GROUPS = {"num_generations": 2}
PRIVILEGED = {**GROUPS, "teacher_prompt_template": "{prompt} {privileged_context}"}
SAMPLED = {"max_length": 32}
GIVEN = {**SAMPLED, "lmbda": 0.0, "distillation_objective": "jsd", "temperature": 0.5}
FULL = {"distillation_mode": "full_logits", "distillation_alpha": 0.5}
DRAWN = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
TOP = {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 0.3}
# Sorted rows of nearly equal probabilities change their order, and gradients jump, with a rounding.
ULD = {
    "max_length": 32,
    "lmbda": 0.0,
    "use_uld_loss": True,
    "uld_student_temperature": 0.3,
    "uld_teacher_temperature": 0.2,
}
HYBRID = {**ULD, "uld_use_hybrid_loss": True, "uld_skip_teacher_eos": False, "beta": 0.4}
CASES = {
    "server_forward": Taught(
        "ServerDistillation", tiny.prompts, {**SERVED, "beta": 0.0, "loss_top_k": 3}
    ),
    "server_forward_renormalised": Taught(
        "ServerDistillation",
        tiny.prompts,
        {**SERVED, "beta": 0.0, "loss_top_k": 3, "loss_add_tail": False},
    ),
    "server_jsd": Taught(
        "ServerDistillation", tiny.prompts, {**SERVED, "beta": 0.5}, evaluated=True
    ),
    "server_reverse": Taught(
        "ServerDistillation",
        tiny.prompts,
        {**SERVED, "beta": 1.0, "gradient_accumulation_steps": 2},
    ),
    "sdpo": Taught("SDPO", tiny.prompts, GROUPS),
    "sdpo_full": Taught("SDPO", tiny.prompts, {**GROUPS, **FULL}, evaluated=True),
    "sdpo_topk_and_policy": Taught(
        "SDPO", tiny.prompts, {**GROUPS, **TOP, "distillation_weight": 0.5}
    ),
    "sdpo_policy": Taught("SDPO", tiny.prompts, {**GROUPS, "distillation_weight": 0.0}),
    "sdpo_clipped": Taught("SDPO", tiny.prompts, {**GROUPS, "steps_per_generation": 2}),
    # No completion succeeds: a loss of nothing, and of the policy.
    "sdpo_failed": Taught(
        "SDPO",
        tiny.prompts,
        {**GROUPS, "distillation_weight": 0.5, "success_reward_threshold": 9.0},
    ),
    "sdft": Taught("SDFT", demonstrations, {**PRIVILEGED, **DRAWN}, evaluated=True),
    "sdft_full_lora": Taught("SDFT", demonstrations, {**PRIVILEGED, **FULL}, lora=True),
    "sdft_topk": Taught(
        "SDFT", demonstrations, {**PRIVILEGED, **TOP, "distillation_add_tail": True}
    ),
    "iw_opd": Taught("IWOPD", tiny.conversations, SAMPLED),
    "iw_opd_jsd": Taught(
        "IWOPD", tiny.conversations, {**GIVEN, "loss_top_k": 0, "beta": 0.4}, evaluated=True
    ),
    "iw_opd_top_1": Taught(
        "IWOPD", tiny.conversations, {**GIVEN, "lmbda": 1.0, "loss_top_k": 1, "beta": 0.4}
    ),
    "iw_opd_top_3": Taught("IWOPD", tiny.conversations, {**GIVEN, "loss_top_k": 3, "beta": 0.0}),
    "gold_bytes": Taught("GOLD", tiny.conversations, ULD, words=290, run=3),
    "gold_bayesian": Taught(
        "GOLD",
        tiny.conversations,
        {**ULD, "uld_token_merge_strategy": "bayesian"},
        words=290,
        run=3,
    ),
    "gold_positions_and_labels": Taught(
        "GOLD",
        tiny.conversations,
        {
            **ULD,
            "use_extended_uld": False,
            "uld_crossentropy_weight": 0.5,
            "gradient_accumulation_steps": 2,
        },
        lora=True,
        words=290,
    ),
    "gold_hybrid": Taught("GOLD", tiny.conversations, HYBRID, evaluated=True, words=290, run=3),
    "gold_sampled": Taught(
        "GOLD", tiny.conversations, {**ULD, "lmbda": 1.0, "use_extended_uld": False}, words=290
    ),
    "iw_opd_server": Taught(
        "IWOPD", tiny.conversations, {**SAMPLED, **SERVED, "use_teacher_server": True}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_trainers_train_the_same(name, path, tmp_path, widest, monkeypatch):  # noqa: F811
    monkeypatch.setattr(vllm_client, "VLLMClient", Server)
    monkeypatch.setattr(cell, "told", set())
    case, tile = CASES[name], TILE.tokens * TILE.vocab
    own, own_elements = trained(case, path, tmp_path, widest, patched=False)
    ours, elements = trained(case, path, tmp_path, widest, patched=True)
    assert max(log.get("grad_norm", 0) for log in own[0]) > 1e-2, "too flat to compare"
    _trainers.assert_same(ours, own)
    assert any("eval_loss" in log for log in ours[0]) == case.evaluated
    assert own_elements > 9 * tile
    assert elements <= max(tile, case.run * WORDS)
    assert not cell.told, "nothing computes full logits"


@pytest.mark.parametrize("answered", [2, 1, 0])
@pytest.mark.parametrize("rows", [2, 5, 1000])
def test_gold_in_blocks_of_any_size(rows, answered, path, tmp_path, monkeypatch):  # noqa: F811
    """Also of texts that are all prompt."""
    monkeypatch.setattr(gold, "_rows", lambda *_: rows)

    def change(labels):
        labels[answered:] = -100

    grad = assert_gold_is_the_same("gold_hybrid", change, path, tmp_path)
    assert bool(grad.any()) == (answered > 0)


@pytest.mark.parametrize("name", ["gold_hybrid", "gold_bayesian"])
def test_gold_of_answers_in_parts(name, path, tmp_path, monkeypatch):  # noqa: F811
    """TRL counts what is labelled, and takes that many tokens from the first."""
    monkeypatch.setattr(gold, "_rows", lambda *_: 2)

    def change(labels):
        labels[:, (labels[0] != -100).nonzero().min() + 2] = -100

    assert assert_gold_is_the_same(name, change, path, tmp_path).any()


def assert_gold_is_the_same(name, change, model, folder):
    """One loss and its gradient, of labels that are changed; the gradient of the head."""
    found = []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            trainer = CASES[name].build(folder, model)
            batch = next(iter(trainer.get_train_dataloader()))
            change(batch["labels"])
            loss = trainer.compute_loss(trainer.model, batch)
            (grad,) = torch.autograd.grad(loss.sum(), [trainer.model.lm_head.weight])
        found.append((loss.detach().sum(), grad, trainer._matched_sum, trainer._unmatched_sum))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    return grad


def test_gold_of_real_logits(path, tmp_path, monkeypatch):  # noqa: F811
    """A script that computes them itself."""
    given, own = [], ULDLoss._compute_distillation_loss

    def noted(*args, **kwargs):
        given.append((args, kwargs, own(*args, **kwargs)))
        return given[-1][-1]

    monkeypatch.setattr(ULDLoss, "_compute_distillation_loss", noted)
    trainer = CASES["gold_bytes"].build(tmp_path, path)
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    monkeypatch.undo()
    ((args, kwargs, expected),) = given
    with fastpo.patched():
        found = ULDLoss._compute_distillation_loss(*args, **kwargs)
    assert torch.equal(found, expected)

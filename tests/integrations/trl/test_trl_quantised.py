"""TRL's trainers over a quantised head: as over the words it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("datasets")

import _trainers
import torch
from _quantised import H, model, own_words
from _tiny import conversations, count_calls, one_thread, preferences  # noqa: F401
from torch import Tensor, nn

import fastpo
from fastpo.integrations.lazy import cell
from fastpo.ops.tiles.tiled import Tiled


def dense(net: Any) -> Any:
    """With the words in memory, and not trained."""
    words = own_words(net.lm_head, torch.float32).clone()
    net.lm_head = nn.Linear(H, net.config.vocab_size, bias=False)
    net.lm_head.weight = nn.Parameter(words, requires_grad=False)
    return net


# Of the trainer, beside a model: the config, and other models.
TRAINERS: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "DPO": (preferences, {}, "ref_model"),
    "SFT": (conversations, {}, None),
    "CPO": (preferences, {}, None),
    "GKD": (conversations, {"lmbda": 0.0, "beta": 0.3}, "teacher_model"),
}


def trained(prefix: str, folder: Any, make: Callable[[int], Any]) -> _trainers.Run:
    data, changes, other = TRAINERS[prefix]
    others = {} if other is None else {other: make(1)}
    changes = {"max_steps": 2, **changes}
    trainer = _trainers.build(prefix, folder, make(0), data(), changes, **others)
    logs, parameters = _trainers.train(trainer)
    for log in logs:
        log.pop("total_flos", None)  # by the number of parameters
    return logs, {name: x for name, x in parameters.items() if "lm_head" not in name}


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("prefix", TRAINERS)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_it_trains_the_same(name, prefix, tmp_path, monkeypatch, caplog):
    own = trained(prefix, tmp_path, lambda seed: dense(model(name, seed=seed)))
    calls, tiles = count_calls(monkeypatch), []
    words = Tiled.words
    monkeypatch.setattr(Tiled, "words", lambda *x: tiles.append(x) or words(*x))
    with fastpo.patched():
        ours = trained(prefix, tmp_path, lambda seed: model(name, seed=seed))
    _trainers.assert_same(ours, own)
    assert tiles and (calls or prefix == "GKD")
    assert "keeps" not in caplog.text and not cell.told


@pytest.mark.usefixtures("afresh")
def test_dpo_trains_an_adapter_beside_it(tmp_path):
    config = _trainers.lora(target_modules=["q_proj", "lm_head"])
    with fastpo.patched():
        net, data = model("nf4"), preferences()
        trainer = _trainers.build("DPO", tmp_path, net, data, {"max_steps": 2}, peft_config=config)
        adapted = trainer.model.get_base_model().lm_head
        torch.nn.init.normal_(adapted.lora_B["default"].weight, std=0.3)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(named.values()))
        own = margin(trainer.model, batch)
        with torch.no_grad(), trainer.model.disable_adapter():
            reference = margin(trainer.model, batch)
        expected = -torch.nn.functional.logsigmoid(0.1 * (own - reference)).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        expected_grads = torch.autograd.grad(expected, list(named.values()))
        torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5)
        trainer.train()


def margin(net: Any, batch: Any) -> Tensor:
    """Chosen over rejected, by the model's own logits."""
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["input_ids"][:, 1:, None]
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, labels).squeeze(-1)
    chosen, rejected = (tokens * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    return chosen - rejected

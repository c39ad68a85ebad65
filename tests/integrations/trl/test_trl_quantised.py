"""TRL's trainers over a quantised head: as over the words it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("datasets")

import _trainers
import torch
from _quantised import H, model, own_words
from _tiny import count_calls, one_thread, preferences  # noqa: F401
from torch import nn

import fastpo


def dense(net: Any) -> Any:
    """With the words in memory, and not trained."""
    words = own_words(net.lm_head, torch.float32).clone()
    net.lm_head = nn.Linear(H, net.config.vocab_size, bias=False)
    net.lm_head.weight = nn.Parameter(words, requires_grad=False)
    return net


def trained(prefix: str, folder: Any, net: Any) -> _trainers.Run:
    reference = {"ref_model": copy.deepcopy(net)} if prefix == "DPO" else {}
    data = _trainers.DATA.get(prefix, preferences)()
    trainer = _trainers.build(prefix, folder, net, data, {"max_steps": 2}, **reference)
    logs, parameters = _trainers.train(trainer)
    for log in logs:
        log.pop("total_flos", None)  # by the number of parameters
    return logs, {name: x for name, x in parameters.items() if "lm_head" not in name}


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("prefix", ["DPO", "SFT", "CPO"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_it_trains_the_same(name, prefix, tmp_path, monkeypatch, caplog):
    own, calls = trained(prefix, tmp_path, dense(model(name))), count_calls(monkeypatch)
    with fastpo.patched():
        ours = trained(prefix, tmp_path, model(name))
    _trainers.assert_same(ours, own)
    assert calls and "keeps" not in caplog.text

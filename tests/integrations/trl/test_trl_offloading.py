"""`activation_offloading=True`: what the head keeps stays where it is, and trains the same.

TRL offloads from an accelerator; here the CPU stands in for it, so that all else is TRL's own.
"""

from __future__ import annotations

import pytest

# Before, TRL offloads from devices that it knows by name: no CPU can stand in for one.
pytest.importorskip("trl", minversion="1.16")

import _tiny as tiny
import _trainers
import torch
from _tiny import one_thread  # noqa: F401

import fastpo

PREFIXES = {"DPO": tiny.preferences, "SFT": tiny.conversations, "KTO": tiny.unpaired}


@pytest.fixture
def offloaded(monkeypatch):
    """Bytes of each tensor that leaves the accelerator."""
    from trl.models import activation_offloading as own

    sizes, make = [], own.get_act_offloading_ctx_manager

    def made(model):
        with pytest.MonkeyPatch.context() as patch:
            cpu = torch.device("cpu")
            patch.setattr(torch.accelerator, "current_accelerator", lambda: cpu)
            manager = make(model, use_pin_memory=False, use_streams=False)
        pack = manager.pack_hook

        def counted(x):
            key = pack(x)
            sizes.extend([x.nbytes] * manager.tracker[key][1])
            return key

        manager.pack_hook = counted
        return manager

    for prefix in PREFIXES:
        module = f"trl.trainer.{prefix.lower()}_trainer.get_act_offloading_ctx_manager"
        monkeypatch.setattr(module, made)
    return sizes


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_head_offloads_nothing(prefix, tmp_path, offloaded):
    def train(**changes):
        trainer = _trainers.build(
            prefix, tmp_path, _trainers.saved(tmp_path), PREFIXES[prefix](), changes
        )
        return _trainers.train(trainer)

    own, most = train(activation_offloading=True), sum(offloaded)
    offloaded.clear()
    with fastpo.patched():
        plain = train()
        assert not offloaded
        ours = train(activation_offloading=True)
    # TRL's own head lets the hidden states go; what ours keeps of every word would be far more.
    assert 0 < sum(offloaded) < most
    _trainers.assert_same(ours, own)
    _trainers.assert_same(ours, plain)

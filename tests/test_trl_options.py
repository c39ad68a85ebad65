"""`fastpo.patch` under every option of DPOTrainer: the same losses, metrics and parameters."""

from __future__ import annotations

import contextlib
import itertools

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo import planner
from fastpo.integrations._trl_trainers import PairTrainer
from fastpo.testing import max_error, rounding

# One tile is wider than anything the backbone makes of a batch, and a twentieth of its logits.
WORDS, HIDDEN = 20_000, 32
TILE = planner.Tiles(32, 640)

SMOOTHED = {"label_smoothing": 0.1}
LOSSES = {
    "margins": ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair"],
    "robust": ["robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"],
    "anchored": ["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"],
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}


def spread(predictions):
    """A metric of the logits themselves; the evaluation loop pads them with -100."""
    logits = predictions.predictions
    return {"spread": float(logits[logits != -100].std())}


# name: (config on top, arguments of the trainer)
OPTIONS = {
    **{
        f"losses_{name}": ({"loss_type": losses, **SMOOTHED}, {}) for name, losses in LOSSES.items()
    },
    "loss_weights": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {},
    ),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, {}),
    "js_divergence": ({"f_divergence_type": "js_divergence"}, {}),
    "alpha_divergence": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {},
    ),
    "ld_alpha": ({"ld_alpha": 0.4}, {}),
    "peft_reference": ({}, {"peft": LORA}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {}),
    "sync_reference": ({"sync_ref_model": True, "ref_model_sync_steps": 1}, {}),
    "evaluation": (EVALUATED, {"eval": True}),
    "compute_metrics": (EVALUATED, {"eval": True, "compute_metrics": spread}),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The model as a script would name it."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model("llama", vocab_size=WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: TILE)


class WidestLogits(tiny.Widest):
    """The head itself, its copies and its gradient have as many words but are no logits."""

    def counts(self, x):
        return x.shape[-2:] not in ((WORDS, HIDDEN), (HIDDEN, WORDS))


def trained(path, folder, changes, arguments, patched):
    """Logs, parameters and the largest tensor of three steps."""
    given = dict(arguments)
    if "peft" in given:
        peft = pytest.importorskip("peft")
        given["peft_config"] = peft.LoraConfig(**given.pop("peft"))
    if given.pop("eval", False):
        given["eval_dataset"] = tiny.preferences().select(range(4))
    # A budget of 0 keeps no probabilities either.
    with fastpo.patched(budget=0) if patched else contextlib.nullcontext():
        trainer = _trainers.build("DPO", folder, str(path), tiny.preferences(), changes, **given)
        with WidestLogits() as widest:
            return *_trainers.train(trainer), widest.elements


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_the_same(name, path, tmp_path):
    own_logs, own, own_widest = trained(path, tmp_path, *OPTIONS[name], patched=False)
    logs, ours, widest = trained(path, tmp_path, *OPTIONS[name], patched=True)
    assert len(logs) == len(own_logs) >= 4
    for log, own_log in zip(logs, own_logs, strict=True):
        assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    tile = TILE.tokens * TILE.vocab
    assert own_widest > 20 * tile
    if name == "compute_metrics":
        return  # TRL recomputes the logits it hands to the caller
    assert widest <= tile


def test_every_loss_is_here():
    """TRL's own names, as our trainer of pairs lists them."""
    assert sorted(itertools.chain(*LOSSES.values())) == sorted(PairTrainer.own)


def test_bfloat16_is_as_near_to_float32_as_trl(path, tmp_path):
    """Under autocast TRL rounds logits to 16 bits and fastpo does not."""
    changes = {"loss_type": ["sigmoid", "sft"]}
    runs = [
        trained(path, tmp_path, {**changes, "bf16": bf16}, {}, patched)
        for bf16, patched in ((False, False), (True, False), (True, True))
    ]
    for name in ("loss", "logps/chosen", "logps/rejected", "entropy"):
        truth, eager, fused = (
            torch.tensor([log[name] for log in logs if name in log]) for logs, *_ in runs
        )
        allowed = 2 * max_error(eager, truth) + rounding(truth, torch.bfloat16)
        assert max_error(fused, truth) <= allowed, name
    for name, truth in runs[0][1].items():
        eager, fused = runs[1][1][name], runs[2][1][name]
        allowed = 2 * max_error(eager, truth) + rounding(truth, torch.bfloat16)
        assert max_error(fused, truth) <= allowed, name
    assert runs[2][2] <= TILE.tokens * TILE.vocab

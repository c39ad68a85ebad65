"""Reference and KL passes compute log-probabilities only; what is logged stays the same."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")
pytest.importorskip("peft")

import _tiny as tiny
import peft
import torch
import trl
from _tiny import one_thread  # noqa: F401

import fastpo

DATA = {"DPO": tiny.preferences, "KTO": tiny.unpaired}


def trainer(prefix, folder):
    tiny.model("llama").save_pretrained(folder / "model")
    config = getattr(trl, f"{prefix}Config")(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    return getattr(trl, f"{prefix}Trainer")(
        model=str(folder / "model"),
        args=config,
        train_dataset=DATA[prefix](),
        eval_dataset=DATA[prefix](),
        processing_class=tiny.tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )


@pytest.mark.parametrize("prefix", DATA)
def test_only_the_policy_s_pass_computes_statistics(prefix, tmp_path, monkeypatch):
    calls = tiny.count_calls(monkeypatch)
    with fastpo.patched():
        built = trainer(prefix, tmp_path)
        built.train()
        trained, calls[:] = list(calls), []
        metrics = built.evaluate()
    policy = [spec.outputs for spec in trained if spec.hidden_grad]
    others = [spec.outputs for spec in trained if not spec.hidden_grad]
    assert policy and all("entropy" in outputs for outputs in policy)
    assert others and all(outputs == ("logps",) for outputs in others)
    assert metrics["eval_entropy"] > 0, "in evaluation the policy has no gradient either"


@pytest.mark.parametrize("prefix", DATA)
def test_a_loss_in_training_mode_without_gradient(prefix, tmp_path):
    """A script may ask for it between steps; the policy's own pass has statistics then, too."""
    found = []
    for grad in (True, False):
        with fastpo.patched(), torch.set_grad_enabled(grad):
            built = trainer(prefix, tmp_path)
            built.model.train()
            batch = next(iter(built.get_train_dataloader()))
            loss = built.compute_loss(built.model, batch)
        found.append([loss.item(), *built._metrics["train"]["entropy"]])
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-5)

"""Every objective of single responses in TRL's KTOTrainer, against full logits."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import trl
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo import objectives
from fastpo.objectives._quantities import SHAPES
from fastpo.objectives._registry import quantities_of
from fastpo.quantities import Quantities

# What an objective may want beside texts and labels: a number per row, or one per token.
COLUMNS = {
    "scores": lambda i, n: 0.3 * i - 1.0,
    "steps": lambda i, n: i % 3 + 1,
    "values": lambda i, n: 0.1 * i,
    "sample_weights": lambda i, n: 0.5 + 0.1 * i,
    "token_weights": lambda i, n: [0.2 * j for j in range(n)],
}


def trainer(folder, *, data=None, ref_model=None, **changes):
    path = folder / "model"
    tiny.model("llama").save_pretrained(path)
    config = trl.KTOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **changes,
    )
    return trl.KTOTrainer(
        model=str(path),
        ref_model=ref_model,
        args=config,
        train_dataset=tiny.unpaired() if data is None else data,
        processing_class=tiny.tokenizer(),
    )


def with_columns(key, folder):
    data = tiny.unpaired()
    asked = {*quantities_of(objectives.get(key)), "sample_weights"}  # which weigh rows of all
    names = sorted(asked & COLUMNS.keys())
    lengths = [len(ids) for ids in trainer(folder).train_dataset["completion_ids"]]
    for name in names:
        data = data.add_column(name, [COLUMNS[name](i, n) for i, n in enumerate(lengths)])
    return data


@pytest.mark.parametrize("key", objectives.available("singles"))
def test_the_loss_is_that_of_full_logits(key, tmp_path):
    reference = tiny.model("llama", seed=1)
    data = with_columns(key, tmp_path)
    with fastpo.patched(objective=key):
        built = trainer(tmp_path, data=data, ref_model=reference)
        batch = next(iter(built.get_train_dataloader()))
        loss = built.compute_loss(built.model, dict(batch))
    assert "sample_weights" in batch
    loss.backward()
    gradient = built.model.lm_head.weight.grad.clone()
    built.model.zero_grad()
    policy = built.model.double()
    given = by_the_book(policy, reference.double(), batch)
    expected = Quantities(given).rows(objectives.get(key)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    truth = policy.lm_head.weight.grad
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-3, atol=1e-5 * truth.abs().max())


def by_the_book(policy, reference, batch):
    mask = batch["completion_mask"][:, 1:].bool()
    own, log_p = token_logps(policy, batch, "")
    with torch.no_grad():
        other, ref_log_p = token_logps(reference, batch, "")
    kl = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1)
    given = {name: x for name, x in batch.items() if name in SHAPES}
    given |= {"labels": batch["label"].bool(), "mask": mask, "token_logps": own}
    given |= {"ref_token_logps": other, "forward_kl": (kl * mask).sum(1)}
    if "KL_input_ids" in batch:
        with torch.no_grad():
            mismatched = [token_logps(m, batch, "KL_")[0].sum(1) for m in (policy, reference)]
        given["kl_logratios"] = mismatched[0] - mismatched[1]
    return given


def token_logps(model, batch, prefix):
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"][:, 1:].bool()
    attention = batch[f"{prefix}attention_mask"]
    log_p = model(input_ids=ids, attention_mask=attention).logits[:, :-1].double().log_softmax(-1)
    tokens = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(mask, tokens, 0.0), log_p


def test_no_kl_pass_and_no_reference_for_those_that_ask_for_none(tmp_path):
    with fastpo.patched():
        built = trainer(tmp_path, loss_type="nll")
        assert built.ref_model is None and not built.calculate_KL
        built.train()
    assert built.args.loss_type == "nll"


def test_an_objective_of_pairs_is_refused(tmp_path):
    message = "dpo: expected an objective of singles, got pairs"
    with fastpo.patched(), pytest.raises(ValueError, match=message):
        trainer(tmp_path, loss_type="dpo")

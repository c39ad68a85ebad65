"""Single responses against TRL's own code: SFT (nll, dft), A*-PO, and the two sides of DPO's BCO.

KTO's two losses are in test_objectives_trl.py, whose stubs serve here. TRL 1.16 has no BCO trainer.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

from test_objectives_trl import (
    agree,
    at,
    batch,
    finite,
    head,
    statistics,
    stub,
    trl_dpo,
    value_and_gradient,
)

from fastpo import quantities
from fastpo.objectives import get

sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")


def trl_sft(stats, mask, loss_type, num_items=None):
    """SFTTrainer's loss with a fused head that returns these statistics."""
    model = head(stats, mask)
    arguments = SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False)
    trainer = stub(
        args=arguments,
        compute_loss_func=None,
        label_smoother=None,
    )
    trainer.accelerator.parallelism_config = None

    def forward(**inputs):
        return SimpleNamespace(**vars(model(**inputs)), label_mask=mask)

    forward.training = False
    return sft_trainer.SFTTrainer.compute_loss(
        trainer, forward, batch(mask), num_items_in_batch=num_items
    )


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("spread", [0.3, 5.0])
def test_sft(loss_type, spread):
    policy, _, mask = statistics(1, spread=spread)
    leaf = policy.logps.requires_grad_()
    ours = quantities.padded(policy, mask, sides=quantities.SINGLES).rows(get(loss_type)).mean()
    agree(ours, trl_sft(policy, mask, loss_type), leaf)
    agree(ours, trl_sft(policy, mask, loss_type, int(mask.sum())), leaf)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_on_nothing(loss_type):
    policy, _, mask = statistics(2)
    mask &= False
    leaf = policy.logps.requires_grad_()
    ours = quantities.padded(policy, mask, sides=quantities.SINGLES).rows(get(loss_type)).mean()
    agree(ours, trl_sft(policy, mask, loss_type), leaf)
    assert [x.abs().sum().item() for x in value_and_gradient(ours, leaf)] == [0.0, 0.0]


@pytest.mark.parametrize("beta", [0.001, 0.3])
def test_a2po(beta):
    a2po_trainer = pytest.importorskip("trl.experimental.a2po.a2po_trainer")
    policy, reference, mask = statistics(3)
    leaf = policy.logps.requires_grad_()
    g = torch.Generator().manual_seed(3)
    scores, values = torch.rand(2, len(mask), generator=g)
    trainer = stub(
        args=SimpleNamespace(beta2=beta),
        _get_sequence_logps=lambda *_: (policy.logps * mask).sum(-1),
    )
    columns = {
        "input_ids": None,
        "attention_mask": None,
        "logits_to_keep": None,
        "ref_logps": (reference.logps * mask).sum(-1),
        "rewards": scores,
        "v_star": values,
    }
    theirs = a2po_trainer.A2POTrainer.compute_loss(trainer, trainer.model, columns)
    q = quantities.padded(policy, mask, sides=quantities.SINGLES, ref=reference)
    rows = (q | {"scores": scores, "values": values}).rows(get("a2po", beta=beta))
    agree(rows.mean(), theirs, leaf)


def test_bco_of_both_sides_is_dpos_bco_pair():
    policy, reference, mask = statistics(4)
    leaf = policy.logps.requires_grad_()
    q = quantities.padded(policy, mask, sides=quantities.SINGLES, ref=reference)
    labels = torch.arange(len(mask)) < len(mask) // 2
    rows = (q | {"labels": labels}).rows(at("bco"))
    agree(2 * rows.mean(), trl_dpo(policy, reference, mask, "bco_pair"), leaf)


@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_far_from_the_reference(shift):
    policy, reference, mask = statistics(5)
    reference.logps = reference.logps + shift
    leaf = policy.logps.requires_grad_()
    q = quantities.padded(policy, mask, sides=quantities.SINGLES, ref=reference)
    columns = {"labels": torch.arange(len(mask)) % 2 == 0, "kl_logratios": torch.zeros(1)}
    for key in ("kto", "kto_apo_zero", "bco"):
        assert finite((q | columns).rows(at(key)).mean(), leaf)

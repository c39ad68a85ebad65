"""OpenRLHF's own DPO and SFT trainers on its Actor, with a strategy that needs no DeepSpeed.

Where OpenRLHF is on the path, as `make frameworks` has it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace as Namespace

import pytest

pytest.importorskip("openrlhf.models", exc_type=ImportError)

import _tiny as tiny
import torch

import fastpo
from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.logits import LazyLogits

pytestmark = pytest.mark.usefixtures("afresh")


class Strategy:
    """One process."""

    accumulated_gradient, ring_attn_group = 1, None

    def __init__(self):
        self.losses = []
        self.args = Namespace(
            model=Namespace(
                label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=0.1
            ),
            ds=Namespace(packing_samples=False),
            logger=Namespace(wandb=Namespace(key=None), tensorboard_dir=None, logging_steps=1),
            eval=Namespace(steps=-1),
            ckpt=Namespace(save_steps=-1),
            train=Namespace(batch_size=2),
        )

    def is_rank_0(self):
        return False

    def backward(self, loss, model, optimizer):
        self.losses.append(loss.detach())
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model):
        return 0.0

    def all_reduce(self, logs):
        return logs


def actor(model, temperature):
    from openrlhf.models import Actor

    made = Actor(model, temperature=temperature)
    made.packing_samples = False
    made.model.global_steps = 1  # as DeepSpeed's engine counts
    return made


def dpo(batches, **common):
    from openrlhf.trainer.dpo_trainer import DPOTrainer

    rows = [
        (x["input_ids"], x["attention_mask"], x["input_ids"].flip(0), x["attention_mask"].flip(0))
        for x in batches
    ]
    reference = copy.deepcopy(common["model"])
    loader = torch.utils.data.DataLoader([(*row, [2, 2, 2]) for row in rows], batch_size=None)
    return DPOTrainer(
        ref_model=reference, train_dataloader=loader, eval_dataloader=None, beta=0.1, **common
    )


def sft(batches, **common):
    from openrlhf.trainer.sft_trainer import SFTTrainer

    rows = [(x["input_ids"], x["attention_mask"], x["attention_mask"]) for x in batches]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    return SFTTrainer(train_dataloader=loader, eval_dataloader=None, **common)


@pytest.mark.parametrize("trainer", [dpo, sft])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trainers_train_the_same(trainer, temperature, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1})

    kinds = []

    def trained():
        strategy, model = Strategy(), actor(tiny.model("llama"), temperature)
        model.model.register_forward_hook(lambda *call: kinds.append(type(call[-1].logits)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        batches = [tiny.batch(seed=seed) for seed in range(3)]
        made = trainer(
            batches, model=model, strategy=strategy, tokenizer=tiny.tokenizer(), optim=optimizer,
            scheduler=scheduler, max_epochs=1,
        )  # fmt: skip
        made.fit(strategy.args)
        return torch.stack(strategy.losses), [x.detach() for x in model.parameters()]

    expected = trained()
    with fastpo.patched(lazy=True):
        found = trained()
    assert not cell.told and len(found[0]) == 3
    assert kinds == [torch.Tensor] * (len(kinds) // 2) + [LazyLogits] * (len(kinds) // 2) != []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

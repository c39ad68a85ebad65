"""A script's own code between a model's logits and the trainer that reads them.

It stands in a forward hook of the model, in an overridden reader, or in SFT's `compute_loss_func`:
losses and gradients are those of TRL alone.
"""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import test_trl_distillation
import test_trl_experimental
import torch
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401
from torch.utils.checkpoint import checkpoint

import fastpo


class Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.tanh() * 2 + logits

    @staticmethod
    def backward(ctx, grad):
        return grad * (3 - 2 * ctx.saved_tensors[0].tanh().square())


def hooked(logits):
    if logits.requires_grad:
        logits.register_hook(lambda grad: 0.5 * grad)
    return logits


def halved(logits):
    logits[..., :7] = 1.5
    return logits.mul_(0.5)


KINDS = {
    "function": Squash.apply,
    "hook": hooked,
    "in_place": halved,
    "reentrant": lambda z: checkpoint(lambda x: 2 * torch.tanh(x), z, use_reentrant=True),
    "detached_part": lambda z: z - 0.3 * z.detach().logsumexp(-1, keepdim=True),
}


def with_hook(trainer, change):
    """After the model's own forward; a fused head, which gives no logits, has nothing to change."""

    def hook(module, args, output):
        if getattr(output, "logits", None) is not None:
            output.logits = change(output.logits)

    trainer.accelerator.unwrap_model(trainer.model).register_forward_hook(hook)
    return trainer


def assert_trains_the_same(make):
    runs = []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            runs.append(_trainers.train(make()))
    _trainers.assert_same(runs[1], runs[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cpo", "sft_smoothed"])
def test_every_kind_of_code(name, kind, tmp_path):
    assert_trains_the_same(
        lambda: with_hook(test_trl_experimental.trainer(name, tmp_path), KINDS[kind])
    )


@pytest.mark.parametrize("name", ["orpo", "tpo", "a2po", "online_dpo", "gkd", "gold"])
def test_every_reader(name, tmp_path):
    home = test_trl_distillation if name in ("gkd", "gold") else test_trl_experimental
    assert_trains_the_same(lambda: with_hook(home.trainer(name, tmp_path), Squash.apply))


class OwnCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        logps = logits.log_softmax(-1)
        ctx.save_for_backward(logps, labels)
        return F.nll_loss(logps, labels)

    @staticmethod
    def backward(ctx, grad):
        logps, labels = ctx.saved_tensors
        scored = (labels != -100).unsqueeze(-1)
        wrong = logps.exp() - F.one_hot(labels.clamp(min=0), logps.shape[-1])
        return grad * wrong * scored / scored.sum(), None


def own_loss(outputs, labels, num_items_in_batch=None):
    """A cross-entropy written as a function, and another term beside it."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    own = OwnCrossEntropy.apply(logits, labels[:, 1:].flatten())
    return own + 0.1 * outputs.logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_a_loss_function_of_the_script(checkpointed, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        if checkpointed is None:
            return own_loss(outputs, labels)

        def of_logits(logits):
            return own_loss(type(outputs)(logits=logits), labels)

        return checkpoint(of_logits, outputs.logits, use_reentrant=checkpointed)

    def make():
        changes, given = {"loss_type": "nll"}, {"compute_loss_func": loss}
        path, data = _trainers.saved(tmp_path), tiny.conversations()
        return _trainers.build("SFT", tmp_path, path, data, changes, **given)

    assert_trains_the_same(make)


def test_a_subclass_that_reads_logits_itself(tmp_path):
    cpo = _trainers.module("CPO")

    class OwnReader(cpo.CPOTrainer):
        @staticmethod
        def get_batch_logps(logits, labels, *args, **kwargs):
            labels = labels[:, 1:].clone()
            losses = [
                OwnCrossEntropy.apply(row, words)
                for row, words in zip(logits[:, :-1], labels, strict=True)
            ]
            return -torch.stack(losses) * (labels != -100).sum(-1)

    class OwnPass(cpo.CPOTrainer):
        def concatenated_forward(self, model, batch):
            chosen, rejected, chosen_logits, *rest = super().concatenated_forward(model, batch)
            return chosen + Squash.apply(chosen_logits).mean(), rejected, chosen_logits, *rest

    for kind in (OwnReader, OwnPass):

        def make(kind=kind):
            return kind(
                model=tiny.model("llama"),
                args=_trainers.config("CPO", tmp_path, {}),
                train_dataset=tiny.preferences(),
                processing_class=tiny.tokenizer(),
            )

        assert_trains_the_same(make)

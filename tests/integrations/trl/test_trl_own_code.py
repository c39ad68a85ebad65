"""A script's own code between a model's logits and the trainer that reads them.

It stands in a forward hook of the model, in an overridden reader, or in SFT's `compute_loss_func`:
losses and gradients are those of TRL alone.
"""

from __future__ import annotations

import contextlib
import copy

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import test_trl_distillation
import test_trl_experimental
import torch
import torch.nn.functional as F
import trl.trainer.utils as utils
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


@pytest.mark.parametrize("name", ["gkd", "gold", "tpo", "orpo"])
def test_a_term_on_the_logits_that_a_loss_gives_out(name, tmp_path):
    home = test_trl_distillation if name in ("gkd", "gold") else test_trl_experimental

    def make():
        trainer = home.trainer(name, tmp_path)
        whole = trainer.compute_loss

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = whole(model, inputs, return_outputs=True)
            logits = getattr(outputs, "logits", None)
            return loss if logits is None else loss + 0.1 * logits.logsumexp(-1).square().mean()

        trainer.compute_loss = compute_loss
        return trainer

    assert_trains_the_same(make)


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="no fused head")
@pytest.mark.parametrize("prefix", ["DPO", "KTO"])
def test_a_loss_without_gradient_while_training(prefix, tmp_path):
    losses = []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            path, data = _trainers.saved(tmp_path), _trainers.DATA[prefix]()
            trainer = _trainers.build(prefix, tmp_path, path, data, {})
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            trainer.model.train()
            with torch.no_grad():
                losses.append(trainer.compute_loss(trainer.model, batch))
    torch.testing.assert_close(*losses)


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="no fused head")
@pytest.mark.parametrize("kind", ["plain", "shared_prompts", "padding_free", "adapter"])
def test_a_deep_copy_of_a_model_has_its_own_weights(kind, tmp_path):
    given = {"peft_config": _trainers.lora(target_modules=["lm_head"])} if kind == "adapter" else {}
    options = {} if kind in ("plain", "adapter") else {kind: True}
    with fastpo.patched(**options):
        path, data = _trainers.saved(tmp_path), tiny.preferences()
        trainer = _trainers.build("DPO", tmp_path, path, data, {}, **given)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        copied = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
        before = trainer.compute_ref_log_probs(copied, batch)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
        after = trainer.compute_ref_log_probs(copied, batch)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


class Wrap(torch.nn.Module):
    """A model of a script's own around one of transformers'."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype
        self.generation_config, self.warnings_issued = inner.generation_config, {}
        self.device = inner.device

    def forward(self, input_ids=None, attention_mask=None, use_cache=False, **more):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("prefix", ["CPO", "ORPO"])
def test_a_model_that_tells_of_no_head(prefix, tmp_path):
    def make():
        model = Wrap(tiny.model("llama"))
        return _trainers.build(prefix, tmp_path, model, tiny.preferences(), {})

    assert_trains_the_same(make)

"""Batches whose rows begin alike, and a model's losses and gradients on them."""

from __future__ import annotations

import contextlib

import _tiny as tiny
import torch

from fastpo.integrations.sharing.backbone import shared_prompts

R, T, COMMON = 6, 24, 14


def _pairs():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 300, (R, T), generator=generator)
    for r in range(0, R - 1, 2):
        ids[r + 1, :COMMON] = ids[r, :COMMON]
    return ids, torch.ones_like(ids)


def right():
    ids, mask = _pairs()
    for r in range(1, R):
        mask[r, T - r - 1 :] = 0
    return ids * mask, mask


def left():
    ids, mask = _pairs()
    for r in range(R):
        mask[r, : r // 2 * 3] = 0
    return ids * mask, mask


def both():
    """Pads on the right, and on the left of the last two rows."""
    ids, mask = right()
    ids[R - 2 :], mask[R - 2 :] = (x[R - 2 :] for x in left())
    return ids, mask


def identical():
    ids, mask = _pairs()
    ids[1] = ids[5] = ids[0]
    return ids, mask


def late_edit():
    ids, mask = _pairs()
    ids[1] = ids[0]
    ids[1, T - 3] = 7
    return ids, mask


def nothing_common():
    ids, mask = _pairs()
    ids[:, 0] = torch.arange(R)
    mask[2, 9:] = 0
    return ids * mask, mask


def one_token_prompt():
    ids, mask = _pairs()
    ids[:, 0], ids[:, 1] = 3, torch.arange(R)
    return ids, mask


def begins_another():
    """A completion that is empty, and rows that are the beginning of others."""
    ids, mask = _pairs()
    mask[1, COMMON:] = 0
    mask[3, COMMON - 2 :] = 0
    return ids * mask, mask


BATCHES = {
    f.__name__: f
    for f in (right, left, identical, late_edit, nothing_common, one_token_prompt, begins_another)
}


def scored(ids, mask):
    """Labels whose token before is a token, too."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100
    return labels


def run(model, batch, shared, dtype=torch.float32, **options):
    """Loss, logits of tokens, gradients, and what was saved."""
    ids, mask = batch
    model = model().to(dtype).train()
    with contextlib.ExitStack() as stack:
        handle = shared and stack.enter_context(shared_prompts(model, always=True, **options))
        out = model(input_ids=ids, attention_mask=mask, labels=scored(ids, mask))
        out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.logits.detach()[mask != 0], grads, handle


def model_of(name, implementation, **changes):
    def make():
        model = tiny.model(name, **changes)
        model.set_attn_implementation(implementation)
        return model

    return make

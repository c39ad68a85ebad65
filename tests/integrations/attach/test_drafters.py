"""Models with layers for multi-token prediction, as transformers 5.23 has them: `MtpModel`."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import _tiny as tiny
import torch
from _tiny import one_thread  # noqa: F401
from torch.nn import functional as F
from transformers import modeling_layers

import fastpo

MtpModel = getattr(modeling_layers, "MtpModel", None)
pytestmark = pytest.mark.skipif(MtpModel is None, reason="needs the MtpModel of transformers 5.23")


def models():
    """A model whose config says that there are two more depths, and these."""
    main = tiny.model("llama", num_mtp_layers=2)
    return main, MtpModel(main, 2).eval()


def test_attached_without_its_drafter_it_is_as_any_other():
    batch = tiny.batch()
    main, _ = models()
    own = main(**batch).loss
    with fastpo.attach(main):
        ours = main(**batch)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, own, rtol=1e-5, atol=1e-5)


def test_a_drafter_is_refused():
    """It has its model's head and no output embeddings; its own loss starts from None in 5.23."""
    _, drafter = models()
    with pytest.raises(RuntimeError, match=r"MtpModel\.get_output_embeddings\(\): expected a tor"):
        fastpo.attach(drafter)
    assert "forward" not in vars(drafter.shared_head)


def test_its_depths_by_multi_token_logps():
    main, drafter = models()
    if not hasattr(drafter, "forward_layer"):
        pytest.skip("transformers: expected an MtpModel that runs one depth, got an older one")
    batch = tiny.batch()
    ids, labels = batch["input_ids"], F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    depths = [main.model(ids).last_hidden_state]
    for d in range(2):
        later = F.pad(ids[:, d + 1 :], (0, d + 1))
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        depths.append(drafter.forward_layer(d, depths[-1], positions, None, input_ids=later))
    found = fastpo.multi_token_logps(depths, main.lm_head.weight, labels).logps
    for d, hidden in enumerate(depths):
        logits = drafter._project_to_logits(hidden).transpose(1, 2)
        own = F.cross_entropy(logits, F.pad(labels[:, d:], (0, d), value=-100), reduction="none")
        torch.testing.assert_close(found[d], -own, rtol=1e-4, atol=1e-4)
        assert own.count_nonzero() > 10 - d

"""What the tests of refusals compare."""

from __future__ import annotations

import _batches
import _tiny as tiny
import pytest
import torch

from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.sharing import attention
from fastpo.integrations.sharing.backbone import backbone_of, shared_prompts


@pytest.fixture(autouse=True)
def fresh():
    say_once.cache_clear()
    yield
    attention.restore()


def values(output):
    """Of a backbone, whatever it is given back in."""
    return (output if isinstance(output, tuple) else tuple(output.values()))[0]


def assert_as_before(make, call, why, caplog, before=lambda model: None):
    """Twice: the same bits, every token computed, one line in the log. `before`: what befalls it
    after it has been shared."""
    expected = values(backbone_of(make())(**call()))
    model = backbone_of(make())
    with shared_prompts(model, always=True) as handle:
        before(model)
        handle.tokens.computed = handle.tokens.padded = 0
        for _ in range(2):
            torch.testing.assert_close(values(model(**call())), expected, rtol=0, atol=0)
        assert handle.tokens.saved == 0
    said = [
        record.message for record in caplog.records if "keeps its padded batch" in record.message
    ]
    assert len(said) == 1 and why in said[0], said


def plain():
    ids, mask = _batches.right()
    return {"input_ids": ids, "attention_mask": mask}


def llama():
    return tiny.model("llama")

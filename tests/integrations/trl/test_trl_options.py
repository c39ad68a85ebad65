"""`fastpo.patch` under the trainers' options: the same losses, metrics and parameters, no logits.

The cases are in `_options.py`.
"""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _options import CASES, Case
from _tiny import one_thread  # noqa: F401
from transformers import GenerationMixin

import fastpo
from fastpo import planner
from fastpo.testing import max_error, rounding

# One tile is wider than anything the backbone makes of a batch, and a tenth of its logits.
WORDS, HIDDEN = 20_000, 32
TILE = planner.Tiles(33, 640)  # of other rows than the hidden size


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
    """The head itself, its copies, parts and gradient have as many words but are no logits."""

    sampling = False

    def counts(self, x):
        return not self.sampling and HIDDEN not in x.shape[-2:]


@pytest.fixture
def widest(monkeypatch):
    """What generation makes of one position at a time does not count."""
    seen, generate = WidestLogits(), GenerationMixin.generate

    def quietly(*args, **kwargs):
        seen.sampling = True
        try:
            return generate(*args, **kwargs)
        finally:
            seen.sampling = False

    monkeypatch.setattr(GenerationMixin, "generate", quietly)
    return seen


def trained(case, path, folder, seen, patched, **options):
    """Logs and parameters of three steps, and the largest tensor."""
    seen.elements = 0
    # A budget of 0 keeps no probabilities either.
    with fastpo.patched(budget=0, **options) if patched else contextlib.nullcontext():
        trainer = case.build(folder, path)
        with seen:
            return _trainers.train(trainer), seen.elements


@pytest.mark.parametrize("name", CASES)
def test_options_train_the_same(name, path, tmp_path, widest):
    case, tile = CASES[name], TILE.tokens * TILE.vocab
    own, own_elements = trained(case, path, tmp_path, widest, patched=False)
    ours, elements = trained(case, path, tmp_path, widest, patched=True)
    _trainers.assert_same(ours, own)
    assert any("eval_loss" in log for log in ours[0]) == case.evaluated
    assert any("eval_spread" in log for log in ours[0]) == case.full_logits
    assert own_elements > 10 * tile
    assert elements <= tile or case.full_logits


@pytest.mark.parametrize("prefix", ["DPO", "KTO", "SFT"])
def test_d_weight_goes_straight_to_the_gradient(prefix, path, tmp_path, widest):
    """Of two batches that one step takes."""
    case = Case(prefix, {"gradient_accumulation_steps": 2})
    own, _ = trained(case, path, tmp_path, widest, patched=False)
    ours, elements = trained(case, path, tmp_path, widest, patched=True, accumulate=True)
    _trainers.assert_same(ours, own)
    assert elements <= TILE.tokens * TILE.vocab


@pytest.mark.parametrize("prefix", ["DPO", "KTO", "SFT"])
def test_bfloat16_is_as_near_to_float32_as_trl(prefix, path, tmp_path, widest):
    """Under autocast TRL rounds logits to 16 bits and fastpo does not."""
    (truths, truth), (eagers, eager), (ours, fused) = (
        trained(Case(prefix, {"bf16": bf16}), path, tmp_path, widest, patched)[0]
        for bf16, patched in ((False, False), (True, False), (True, True))
    )
    assert widest.elements <= TILE.tokens * TILE.vocab
    for name in ("loss", "logps/chosen", "logps/rejected", "entropy"):
        columns = [[log[name] for log in logs if name in log] for logs in (truths, eagers, ours)]
        if columns[0]:
            assert_as_near(name, *map(torch.tensor, columns))
    for name in truth:
        assert_as_near(name, truth[name], eager[name], fused[name])


def assert_as_near(name, truth, eager, fused):
    allowed = 2 * max_error(eager, truth) + rounding(truth, torch.bfloat16)
    assert max_error(fused, truth) <= allowed, name

"""Evaluation with metrics of the script's own: the same numbers, and logits only when all are read.

`preprocess_logits_for_metrics` stands between the model and `compute_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _options import Case
from _tiny import one_thread  # noqa: F401
from test_trl_options import TILE, path, small_tiles, trained, widest  # noqa: F401

from fastpo.integrations.lazy import cell


def score(predictions: Any) -> dict[str, float]:
    """The evaluation loop pads predictions with -100."""
    found = predictions.predictions
    return {"score": float(found[found != -100].mean())}


def best_word(logits: Any, labels: Any) -> Any:
    return logits.argmax(-1)


def logp(logits: Any, labels: Any) -> Any:
    words = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    return torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, words).squeeze(-1)


def some_words(logits: Any, labels: Any) -> Any:
    return torch.topk(logits, 3, dim=-1).indices


def surest(logits: Any, labels: Any) -> Any:
    return logits.softmax(-1).max(-1).values


def gold() -> Any:
    return tiny.preferences().map(lambda row: {"reference": row["chosen"]})


@dataclass(frozen=True)
class Hooked(Case):
    """DPO's and KTO's constructors have no argument for the hook."""

    hook: Callable[[Any, Any], Any] | None = best_word
    evaluated: bool = True
    arguments: dict[str, Any] = field(default_factory=lambda: {"compute_metrics": score})

    def build(self, folder: Any, model: Any) -> Any:
        trainer = super().build(folder, model)
        trainer.preprocess_logits_for_metrics = self.hook
        return trainer


# The default of TRL 1.13 and 1.14 has no logits for the hook.
NLL = {"loss_type": "nll"}
HOOKED = {
    "sft_best_word": Hooked("SFT", NLL),
    "sft_logp_lora": Hooked("SFT", NLL, lora=True, hook=logp),
    "sft_smoothed": Hooked("SFT", {"label_smoothing_factor": 0.1, **NLL}),
    "sft_surest": Hooked("SFT", NLL, hook=surest),
    "dpo_logp": Hooked("DPO", hook=logp),
    "dpo_lora": Hooked("DPO", lora=True),
    "tpo": Hooked("TPO", data=gold),
    "tpo_all": Hooked("TPO", data=gold, hook=None),
    "kto_some_words": Hooked("KTO", hook=some_words),
}


@pytest.mark.parametrize("name", HOOKED)
def test_metrics_of_few_numbers(name, path, tmp_path, widest, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cell, "told", set())
    case, tile = HOOKED[name], TILE.tokens * TILE.vocab
    own, own_elements = trained(case, path, tmp_path, widest, patched=False)
    ours, elements = trained(case, path, tmp_path, widest, patched=True)
    _trainers.assert_same(ours, own)
    assert any("eval_score" in log for log in ours[0])
    assert own_elements > 10 * tile
    whole = case.hook is None
    assert bool(cell.told) == whole
    assert (elements > tile) == whole

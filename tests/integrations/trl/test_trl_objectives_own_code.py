"""A script's own subclass of DPOTrainer around an objective by name, and models it compiles."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import trl
from _tiny import one_thread  # noqa: F401

import fastpo


def test_a_scripts_own_methods_stand_around_the_objective(tmp_path):
    seen = []

    class Halved(trl.DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            return super()._compute_loss(model, inputs, return_outputs) / 2

        def compute_ref_log_probs(self, model, inputs):
            seen.append((model.training, len(list(model.parameters()))))
            return super().compute_ref_log_probs(model, inputs)

    def built(kind):
        path = _trainers.saved(tmp_path)
        return kind(
            model=path,
            ref_model=tiny.model("llama", seed=1),
            args=_trainers.config("DPO", tmp_path, {"max_steps": 1}),
            train_dataset=tiny.preferences(),
            processing_class=tiny.tokenizer(),
        )

    class ByName(Halved):
        def _compute_loss(self, model, inputs, return_outputs):
            return trl.DPOTrainer._compute_loss(self, model, inputs, return_outputs) / 2

    with fastpo.patched(objective="dpo"):
        whole, half = (_trainers.train(built(kind))[0][0] for kind in (trl.DPOTrainer, Halved))
        assert _trainers.train(built(ByName))[0][0]["loss"] == half["loss"]
        seen.pop()
    assert half["loss"] == pytest.approx(whole["loss"] / 2, rel=1e-3)
    assert half["grad_norm"] == pytest.approx(whole["grad_norm"] / 2, rel=1e-4)
    assert seen == [(False, len(list(tiny.model("llama").parameters())))]


@pytest.mark.parametrize(("prefix", "key"), [("DPO", "dpo"), ("KTO", "kto")])
def test_a_compiled_model_and_its_compiled_reference(prefix, key, tmp_path):
    # The head of TRL 1.15 is a kernel that the interpreter would run, and that it cannot compile.
    pytest.importorskip("trl", minversion="1.16")

    def built():
        changes = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
        path, data = _trainers.saved(tmp_path), _trainers.DATA[prefix]()
        return _trainers.build(prefix, tmp_path, path, data, changes)

    with fastpo.patched(objective=key, beta=0.1):
        found = _trainers.train(built())
    _trainers.assert_same(found, _trainers.train(built()))

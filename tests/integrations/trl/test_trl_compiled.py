"""`fastpo.patch` under trainers whose model is compiled (`torch_compile` of their config)."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _options import Case
from _tiny import one_thread  # noqa: F401
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

import fastpo
from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.trl.head import HEAD
from fastpo.testing import make_head

# Its constructor writes ACCELERATE_DYNAMO_BACKEND, which every later config would read.
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    for name in ("BACKEND", "MODE", "USE_REGIONAL_COMPILATION"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    AcceleratorState._reset_state(True)
    torch.compiler.reset()
    say_once.cache_clear()
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", [Case("DPO"), Case("CPO", data=tiny.preferences)])
def test_a_compiled_model_trains_the_same(case, path, tmp_path):
    own = _trainers.train(case.build(tmp_path, path))
    compiled = Case(case.prefix, {**case.changes, **COMPILED}, data=case.data)
    with fastpo.patched():
        trainer = compiled.build(tmp_path, path)
        logs, parameters = _trainers.train(trainer)
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    _trainers.assert_same((logs, parameters), own)


@pytest.fixture
def regions(monkeypatch):
    """What `accelerate launch --dynamo_use_regional_compilation` sets."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")


@pytest.mark.parametrize("case", [Case("DPO"), Case("CPO", data=tiny.preferences)])
def test_lora_on_the_head_of_compiled_regions(case, path, tmp_path, regions):
    own = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    arguments, runs = {"peft_config": _trainers.lora(**own)}, []
    for changes in (case.changes, {**case.changes, **COMPILED}):
        torch.manual_seed(0)  # of the adapter's weights
        with fastpo.patched():
            trainer = Case(case.prefix, changes, data=case.data, arguments=arguments)
            trainer = trainer.build(tmp_path, path)
            runs.append(_trainers.train(trainer))
        AcceleratorState._reset_state(True)
    # By its loss alone: TRL logs these steps as an evaluation's, as `trainer.model` is not trained.
    before, after = ([log["loss"] for log in logs if "loss" in log] for logs, _ in runs)
    assert after == pytest.approx(before, rel=1e-5)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-5)


SHARING = {
    "regions": "LlamaModel keeps its padded batch: layers that are compiled",
    "whole": "Trainer leaves its backbone uncompiled: shared_prompts packs each batch before it",
}


@pytest.mark.parametrize("how", SHARING)
@pytest.mark.parametrize("prefix", ["DPO", "CPO"])
def test_shared_prompts_say_what_is_not_compiled(how, prefix, path, tmp_path, request, caplog):
    if how == "regions":
        request.getfixturevalue("regions")
    case = Case(prefix, COMPILED, data=tiny.preferences)
    with fastpo.patched(shared_prompts=True):
        logs, _ = _trainers.train(case.build(tmp_path, path))
    assert caplog.text.count(SHARING[how]) == 1
    assert any(log.get("fastpo/tokens_saved") for log in logs) == (how == "whole")


def test_the_head_breaks_a_graph_once():
    """A graph that breaks is traced again, with the backbone that is in it."""
    x = make_head(5, 31, 8)
    counters.clear()
    with fastpo.patched():
        head = HEAD.current()

        @torch.compile(backend="eager")
        def logps(hidden):
            found = head.apply(2 * hidden, x.weight, None, x.labels, 1.0, 256)
            return found[0].sum()

        logps(x.hidden)
    assert counters["graph_break"].total() == 1

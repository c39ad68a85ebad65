"""The demo: its data, what it refuses, and a miniature run from end to end."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from _preference_rows import GOOD, chat, write
from transformers import GPT2Config, MambaConfig

from fastpo.demo import data, jobs, make_data, objective, plot, prepare, report
from fastpo.demo.errors import DemoError, DemoFailure
from fastpo.demo.options import Options, Shape
from fastpo.demo.tokenizer import encode, texts_of, train_tokenizer

pytest.importorskip("trl")
pytest.importorskip("matplotlib")
TINY = Shape(vocab=512, hidden=16, layers=1, heads=2)


def test_embedded_pairs_are_what_the_generator_writes():
    for path, rows in zip(data.EMBEDDED, make_data.make_pairs(), strict=True):
        assert path.read_text(encoding="utf-8") == make_data.as_jsonl(rows)


def test_embedded_pairs_are_well_formed():
    pairs = data.embedded_pairs()
    assert pairs.conversational
    assert (len(pairs.train), len(pairs.held_out)) == (336, 64)
    assert len({json.dumps(row["prompt"]) for row in pairs.rows}) == 400
    longer = sum(len(answer(row, "chosen")) > len(answer(row, "rejected")) for row in pairs.rows)
    assert 0.45 < longer / 400 < 0.55, "length gives the preference away"
    held_out = {topic["task"] for topic in make_data.read_topics() if in_any(topic, pairs.held_out)}
    assert len(held_out) == make_data.HELD_OUT_TOPICS
    assert not any(task in json.dumps(pairs.train) for task in held_out)


def answer(row, side):
    return row[side][0]["content"]


def in_any(topic, rows):
    return any(topic["task"] in answer(row, "prompt") for row in rows)


def test_embedded_preference_can_be_learned_from_words():
    """Naive Bayes on the training rows' words tells the held-out sides apart."""
    pairs = data.embedded_pairs()
    counts = {side: Counter() for side in ("chosen", "rejected")}
    for row in pairs.train:
        for side, counter in counts.items():
            counter.update(answer(row, side).split())

    def score(text):
        odds = (math.log((counts["chosen"][w] + 1) / (counts["rejected"][w] + 1)) for w in text)
        return sum(odds)

    right = [
        score(answer(row, "chosen").split()) > score(answer(row, "rejected").split())
        for row in pairs.held_out
    ]
    assert sum(right) / len(right) > 0.9


def test_tokenizer_has_the_whole_vocabulary():
    pairs = data.embedded_pairs()
    tokenizer = train_tokenizer(texts_of(pairs.train), 4096)
    assert len(tokenizer) == 4096
    text = "Ünïcode, <|reserved_4000|> and 漢字\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(4000) == "<|reserved_4000|>"
    assert 4000 not in ids
    prompt, chosen, rejected = encode(tokenizer, pairs.train[0])
    assert prompt < min(chosen, rejected)


def fit(rows, *, config=None, **options):
    options = Options(**options)
    pairs = data.Pairs(
        "x.jsonl", rows[:-1], rows[-1:], {id(r): f"row {i}" for i, r in enumerate(rows)}
    )
    tokenizer = train_tokenizer(texts_of(rows), 512)
    return prepare.fit(options, pairs, tokenizer, config)


def test_rows_that_are_too_long():
    long_answer = GOOD | {"chosen": "word " * 200 + "end"}
    long_prompt = GOOD | {"prompt": "xyz " * 200}
    rows = [GOOD, long_answer, long_prompt, GOOD | {"prompt": "Why?"}]
    with pytest.raises(
        DemoError, match=r"^row 1: prompt and answer are \d+ tokens long, over --max"
    ):
        fit(rows, max_length=64)
    fitted = fit(rows, max_length=64, truncate=True)
    assert (fitted.truncated, fitted.dropped) == (2, 1)
    assert long_prompt not in fitted.pairs.rows
    with pytest.raises(DemoError, match="expected at least 2 rows that fit"):
        fit([long_prompt, GOOD], max_length=64, truncate=True)
    assert fit(rows, max_length=2048).truncated == 0


def test_a_length_that_a_model_has_no_positions_for():
    long_answer = GOOD | {"chosen": "word " * 200 + "end"}
    rows, config = [GOOD, long_answer], GPT2Config(n_positions=64)
    with pytest.raises(DemoError, match=r"over --max-length 64; pass --truncate$"):
        fit(rows, config=config)
    with pytest.raises(DemoError, match=r"^--max-length: expected at most 64, the positions of"):
        fit(rows, config=config, max_length=65)
    rows[1] = GOOD | {"chosen": "word " * 1100 + "end"}
    with pytest.raises(DemoError, match=r"over --max-length 1024; raise it, or pass --truncate$"):
        fit(rows, config=MambaConfig())  # which has no positions to run out of
    assert fit(rows, config=MambaConfig(), max_length=8192).longest > 1024


def test_a_chat_template_that_fails():
    rows = [chat("a", "b", "c"), chat("d", "e", "f")]
    tokenizer = train_tokenizer(texts_of(rows), 512)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    pairs = data.Pairs("x.jsonl", rows[:1], rows[1:], {id(row): "row 1" for row in rows})
    with pytest.raises(DemoError, match="row 1: the chat template refuses it: ZeroDivisionError"):
        prepare.fit(Options(), pairs, tokenizer, None)


def test_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    prepare.check_out(Options(out=out))
    out.mkdir()
    prepare.check_out(Options(out=out))
    (out / "old").write_text("x")
    with pytest.raises(DemoError, match="not empty; pass --overwrite"):
        prepare.check_out(Options(out=out))
    prepare.check_out(Options(out=out, overwrite=True))
    with pytest.raises(DemoError, match="expected a folder, got a file"):
        prepare.check_out(Options(out=out / "old", overwrite=True))
    with pytest.raises(DemoError, match="--data lies in it"):
        prepare.check_out(Options(out=out, overwrite=True, data=out / "old"))
    for folder in (tmp_path, tmp_path.parent):
        with pytest.raises(DemoError, match="the current folder lies in it"):
            prepare.check_out(Options(out=folder, overwrite=True))


def test_models_that_cannot_be_used(tmp_path):
    for config, message in (
        (None, "no config.json"),
        ({"model_type": "llama"}, "no weights"),
        ({"model_type": "t5"}, "expected a causal language model, got t5"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": ["llama"]}, "config.json: expected one that transformers loads, got TypeE"),
    ):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        if message != "no weights":
            (tmp_path / "model.safetensors").touch()
        with pytest.raises(DemoError, match=message):
            prepare.model_config(Options(model=tmp_path))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(DemoError, match="only the built model is warmed up"):
        Options(model=tmp_path, warmup_steps=3)


@pytest.mark.parametrize("key", objective.usable())
def test_objectives_that_can_be_trained(key):
    chosen = objective.choose(key)
    assert (chosen.loss_type is not None) == (key in objective.TRL_LOSSES)
    assert objective.bind(chosen) is not None
    if "beta" in chosen.hyperparameters:
        assert objective.choose(key, beta=0.7).trl_arguments["beta"] == 0.7


def test_objectives_that_cannot():
    assert objective.choose("sigmoid").key == "dpo"
    assert objective.choose("robust").trl_arguments["label_smoothing"] > 0
    assert {"simpo", "cpo", "orpo", *objective.TRL_LOSSES} <= set(objective.usable())
    with pytest.raises(DemoError, match=r"expected one of dpo, .*, got 'nothing'"):
        objective.choose("nothing")
    with pytest.raises(DemoError, match=r"got 'simpoo'; close to it: simpo"):
        objective.choose("simpoo")
    with pytest.raises(DemoError, match=r"close to it: sigmoid,"):
        objective.choose("sigmiod")
    with pytest.raises(DemoError, match="expected one for pairs, got one of singles"):
        objective.choose("kto")
    with pytest.raises(DemoError, match="--beta: sft has none"):
        objective.choose("sft", beta=0.1)


def test_a_failure_leaves_everything_as_it_was(tmp_path, monkeypatch):
    from fastpo.demo.run import run_demo

    def die(job, name):
        raise DemoFailure("died")

    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    monkeypatch.setattr(jobs, "run", die)
    with pytest.raises(DemoFailure, match="died"):
        run_demo(Options(shape=TINY, out=out, overwrite=True), say=lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "x"


def test_from_end_to_end(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpo.demo.run import run_demo

    rows = data.embedded_pairs().train[:14]
    out = tmp_path / "out"
    options = Options(
        data=write(tmp_path / "pairs.jsonl", *rows),
        shape=TINY,
        steps=2,
        warmup_steps=1,
        batch_size=2,
        max_length=64,
        truncate=True,
        out=out,
    )
    said = []
    figures = run_demo(options, say=said.append)
    assert sorted(path.name for path in out.iterdir()) == ["model", "plot.png", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.jsonl"]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.config.vocab_size == len(tokenizer) == TINY.vocab
    ids = tokenizer.apply_chat_template(rows[0]["prompt"], return_tensors="pt", return_dict=True)
    assert model(**ids).logits.isfinite().all()
    check_report(json.loads((out / "report.json").read_text()), figures, said)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    check_without_matplotlib(figures, tmp_path / "plain", monkeypatch)
    with pytest.raises(DemoError, match="not empty"):
        run_demo(replace(options, steps=1))


def check_without_matplotlib(figures, folder, monkeypatch):
    """All but the picture, and how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    prepare.check_packages()
    folder.mkdir()
    report.write(figures, folder)
    assert [path.name for path in folder.iterdir()] == ["report.json"]
    (line,) = (x for x in report.closing(figures, folder).splitlines() if x.startswith("plot "))
    assert line.endswith("none without matplotlib: pip install 'fastpo[plots]'")


def test_figures_are_compared_with_trls():
    compared = {
        "fastpo": {"times_faster": 3.14, "largest_loss_difference": 1e-6},
        "shared": {"times_faster": 4.0, "largest_loss_difference": 2e-6},
    }

    def best(shared):
        changed = compared | {"shared": {"times_faster": shared}}
        return plot.best(changed, "times_faster", "faster", "slower")

    assert best(4.0) == "3.1x, 4.0x faster"
    assert best(0.5) == "3.1x faster, 2.0x slower"
    assert best(None) == "3.1x faster"
    assert plot.difference(compared) == "largest difference 2.0e-06"
    compared["shared"]["largest_loss_difference"] = None
    assert plot.difference(compared) == "largest difference not finite"


def test_a_single_step_has_no_time_in_the_picture():
    from matplotlib import pyplot

    axes = pyplot.figure().subplots()
    plot.bars(axes, {"fastpo": None, "shared": 0.0, "trl": 2.5}, "{:.2f} s", "")
    assert [text.get_text() for text in axes.texts] == ["–", "0.00 s", "2.50 s"]
    pyplot.close("all")


def check_report(report, figures, said):
    assert report == json.loads(json.dumps(figures))
    assert report["data"]["train_pairs"] + report["data"]["held_out_pairs"] == 14
    assert report["data"]["truncated_rows"] > 0
    assert {"cpu", "cores", "device"} <= set(report["machine"])
    assert report["versions"]["torch"]
    assert len(report["warmup"]["loss"]) == 1
    assert set(report["variants"]) == {"fastpo", "shared", "trl"}
    for name, run in report["variants"].items():
        assert len(run["loss"]) == 2
        assert (run["tokens_saved"] > 0) == (name == "shared")
        assert run["median_step_seconds"] > 0
        assert run["memory_bytes"]["increase"] >= 0
        assert run["held_out"]["step"][-1] == 2
    for name in ("fastpo", "shared"):
        assert report["comparison"][name]["largest_loss_difference"] < 1e-4
    assert "rows over 64 tokens" in said[0]
    saved = report["variants"]["shared"]["tokens_saved"]
    assert f"through the layers 100% {1 - saved:.0%} 100%" in re.sub(r"\s+", " ", said[1])
    assert "largest difference" in said[1]
    assert str(Path("out") / "plot.png") in said[1]

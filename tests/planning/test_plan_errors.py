"""`fastpo plan`: what is wrong in what was given is named in one line, and nothing else is."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
from dataclasses import replace

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import _tiny as tiny
import torch
from transformers import CONFIG_MAPPING, AutoConfig, GPT2Config, Llama4TextConfig

import fastpo
from fastpo import cli
from fastpo.bench.process import for_memory, fresh
from fastpo.planning import cli as planning_cli
from fastpo.planning import measure, quantised
from fastpo.planning.fits import Depths
from fastpo.planning.given import foreign
from fastpo.planning.plan import Head, StepPlan
from fastpo.planning.setting import Setting

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
DEEP = {"deep list": "[" * 100_000, "deep object": '{"a":' * 100_000, "digits": "1" * 5000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text(json.dumps(CONFIG))
    tiny.tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """What is said of a plan that is refused; nothing is written where it ran."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def said(*arguments):
        given = map(str, arguments)
        assert cli.main(["plan", "--context", "64", "--no-search", *given]) == 2
        # transformers may warn before
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("fastpo "))
        assert list((tmp_path / "here").iterdir()) == []
        return line.removeprefix("fastpo plan: error: ")

    return said


WRONG = {
    "no model": (["--model", "nowhere"], "model: expected a folder or a config.json, got"),
    "none": ([], "--model: expected a folder"),
    "gpu": (["--gpu", "h1000"], "gpu: expected a size as 80GiB or one of b200, "),
    "gpu below none": (["--gpu=-5GiB"], "gpu: expected a size as 80GiB or one of b200, "),
    "trainer": (["--trainer", "ppo"], "trainer: expected one of dpo, "),
    "dtype": (["--dtype", "int8"], "dtype: expected one of bf16, "),
    "optimizer": (["--optimizer", "lion"], "optimizer: expected one of adamw, "),
    "attention": (["--attention", "eager"], "attention: expected one of sdpa, flash, got"),
    "flash": (["--attention", "flash", "--dtype", "fp32"], "attention: expected sdpa with fp32"),
    "context": (["--context", "1"], "context: expected an integer >= 2, got 1"),
    "batch": (["--batch", "0"], "batch: expected an integer >= 1, got 0"),
    "prompt": (["--prompt", "1"], "prompt: expected a number in [0, 1), got 1"),
    "lora": (["--lora", "rank=16"], "lora: expected r=16,targets=q_proj+v_proj, got"),
    "comma": (["--lora", "r=16targets=q_proj"], "lora: expected r=16,targets=q_proj"),
    "trailing comma": (["--lora", "r=16,"], "lora: expected r=16,targets=q_proj"),
    "no rank": (["--lora", "r="], "lora: expected r=16,targets=q_proj+v_proj, got 'r='"),
    "targets": (["--lora", "targets=nothing"], "lora: "),
    "empty target": (["--lora", "targets=q_proj+"], "lora: expected r=16,targets=q_proj"),
    "adapted head": (["--lora", "targets=lm_head"], "lora: expected targets below the head"),
    "4 bits": (["--load-in-4bit"], "load_in_4bit: expected an adapter (lora) with it, got none"),
    "adapter": (["--reference", "adapter-off"], "reference: expected an adapter"),
    "data": (["--data", "nowhere.jsonl"], "data: nowhere.jsonl: no such file"),
    "no picture": (["--plot", "x.word"], "plot: expected a picture's path, got x.word"),
    "picture": (["--plot", "no/x.png"], "plot: expected a file in a folder to write to, got 'no/x"),
    "picture of a folder": (["--plot", "."], "plot: expected a file to write, got the folder '.'"),
    "picture of no name": (["--plot", ""], "plot: expected a file to write, got the folder '.'"),
    "json": (["--json", "no/x.json"], "json: expected a file in a folder to write to, got 'no/x"),
    "json of a folder": (["--json", "."], "json: expected a file to write, got the folder '.'"),
    "json of no name": (["--json", ""], "json: expected a file to write, got the folder '.'"),
    "budget": (["--budget", "-1"], "budget: expected"),
    "ratio": (["--shared-prompts", "4"], "shared_prompts: expected P:C, prompt to answer, or"),
    "trainer of it": (
        ["--shared-prompts", "4:1", "--trainer", "sft"],
        "shared_prompts: expected P:C,K",
    ),
    "two prompts": (["--shared-prompts", "4:1", "--prompt", "0.5"], "prompt: expected none beside"),
    "no teacher": (["--trainer", "gkd", "--teacher", "nowhere"], "teacher: expected a folder"),
    "a teacher": (["--teacher", "nowhere"], "teacher: expected none for dpo, got"),
    "reference": (["--trainer", "gkd", "--reference", "none"], "reference: expected none beside"),
    "no reference": (["--trainer", "sft", "--reference", "model"], "reference: expected none for"),
    "a loss of it": (["--reference", "none"], "reference: expected one of model, adapter-off, pre"),
    "precomputed": (
        ["--trainer", "grpo", "--reference", "precomputed"],
        "reference: expected one of dpo, kto with precomputed, got grpo",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name, folder, refused):
    given, message = WRONG[name]
    model = [] if name == "none" or "--model" in given else ["--model", folder]
    assert refused(*model, *given).startswith(message)


KINDS = {
    "a model": (
        {"model": torch.nn.Linear(2, 2)},
        "model: expected a folder, a config.json or a conf",
    ),
    "nothing": (
        {"model": None},
        "model: expected a folder, a config.json or a config, got NoneType",
    ),
    "a teacher": (
        {"trainer": "gkd", "teacher": {}},
        "teacher: expected a folder, a config.json or",
    ),
    "4 bits": ({"load_in_4bit": "yes", "lora": "r=8"}, "load_in_4bit: expected True or False, got"),
    "search": ({"search": None}, "search: expected True or False, got None"),
    "measure": ({"measure": 1}, "measure: expected True or False, got 1"),
    "as patch has it": ({"shared_prompts": True}, "shared_prompts: expected P:C, prompt to answer"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_of_another_kind(name):
    given, message = KINDS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fastpo.plan_step(**{"model": GPT2Config(), "search": False, **given})


@pytest.mark.parametrize("given", [["--plot", "."], ["--json", "no/x.json"]])
def test_files_are_asked_for_before_the_plan(given, folder, refused, monkeypatch, capsys):
    monkeypatch.setattr("fastpo.planning.plan.plan_step", lambda *_, **__: pytest.fail("began"))
    refused("--model", folder, *given)


class _Plan:
    fits = True

    def as_json(self):
        return "{}"


def test_a_reader_that_leaves_early_is_no_error(folder, tmp_path, monkeypatch):
    """And files are there before anybody reads."""

    def leaves(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("fastpo.planning.plan.plan_step", lambda *_, **__: _Plan())
    monkeypatch.setattr("fastpo.planning.cli.print", leaves, raising=False)
    options = argparse.Namespace(model=folder, json=tmp_path / "p.json")
    with pytest.raises(BrokenPipeError):
        planning_cli._plan(options)
    assert (tmp_path / "p.json").read_text() == "{}\n"


def test_a_config_with_code_of_its_own(tmp_path, refused):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit(77)")
    line = refused("--model", tmp_path)
    assert line.startswith("model: expected a config transformers knows")


CONFIGS = {
    "no words": ({"vocab_size": 0}, "model: expected vocab_size >= 1, got 0"),
    "no layers": ({"num_hidden_layers": 0}, "model: expected num_hidden_layers >= 1, got 0"),
    "width": ({"hidden_size": -4}, "model: expected hidden_size >= 1, got -4"),
    "no heads": ({"num_attention_heads": 0}, "model: expected num_attention_heads >= 1, got 0"),
    "kind": ({"num_hidden_layers": "a"}, "model: expected a config transformers knows in "),
    "dtype": ({"torch_dtype": "nothing"}, "model: expected a config transformers knows in "),
    "activation": ({"hidden_act": "nothing"}, "model: expected a causal language model, got Key"),
    "keys": ({"num_key_value_heads": 3}, "model: expected one whose layers run, got RuntimeError"),
    "multiple": ({"model_type": "llama", "hidden_size": 65}, "model: expected a config transform"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_no_model(name, tmp_path, refused):
    changes, message = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    assert refused("--model", tmp_path).startswith(message)


def test_layers_that_do_not_run_log_no_traceback(tmp_path, refused, monkeypatch):
    logged = []
    log = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(log, "handle", logged.append)
    config = CONFIG | {"num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refused("--model", tmp_path).startswith("model: expected one whose layers run, got Run")
    assert not logged and log.isEnabledFor(logging.ERROR)


def test_what_only_training_meets(tmp_path, refused):
    """PEFT puts an adapter on Llama 4's router, and expects a tensor of it; xLSTM's kernels take no
    other dtype than float32."""
    llama = Llama4TextConfig(
        **{name: CONFIG[name] for name in ("hidden_size", "num_attention_heads", "vocab_size")},
        head_dim=16, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=2,
        intermediate_size=64,
    )  # fmt: skip
    llama.save_pretrained(tmp_path / "llama")
    line = refused("--model", tmp_path / "llama", "--lora")
    assert line.startswith("model: expected one whose layers run, got AttributeError")
    xlstm = {"model_type": "xlstm", "hidden_size": 64, "num_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(xlstm))
    line = refused("--model", tmp_path, "--trainer", "sft")
    assert line.startswith("model: expected one whose layers run, got RuntimeError")


def test_a_head_that_is_no_plain_layer(tmp_path, refused):
    """Dory's has a factor for each word. As a RuntimeError the exit code was that of no room."""
    if "dory" not in CONFIG_MAPPING:
        pytest.skip("needs a transformers that has Dory")
    layers = dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 2)
    dory = CONFIG | layers | {"model_type": "dory", "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(dory))
    line = refused("--model", tmp_path)
    assert line.startswith("model: DoryForCausalLM.get_output_embeddings(): expected a torch.nn.L")


def test_a_head_behind_layers_of_its_own(tmp_path, refused):
    changes = {"model_type": "electra", "is_decoder": True, "embedding_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    assert refused("--model", tmp_path).startswith("model: expected a head of hidden size 64, ")


def test_more_positions_than_a_table_has(tmp_path, refused):
    GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=32).save_pretrained(
        tmp_path
    )
    line = refused("--model", tmp_path)
    assert line.startswith("context: expected at most 32, the positions that the model has a table")


def test_a_model_that_is_not_there_is_no_reason_to_import(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpo.planning.plan", None)
    assert refused("--model", "nowhere").startswith("model: expected a folder")


def test_a_teacher_that_does_not_run(tmp_path, folder, refused):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 3}))
    line = refused("--model", folder, "--trainer", "gkd", "--teacher", tmp_path)
    assert line.startswith("teacher: expected one whose layers run, got RuntimeError")


@pytest.mark.parametrize("name", DEEP)
def test_files_out_of_bounds(name, tmp_path, folder, refused):
    (tmp_path / "config.json").write_text(DEEP[name])
    assert refused("--model", tmp_path).startswith("model: expected a config transformers knows")
    data = tmp_path / "data.jsonl"
    data.write_text(DEEP[name])
    line = refused("--model", folder, "--data", data)
    assert line.startswith(f"data: {data}") and "expected one JSON " in line


TURNS = [{"role": "user", "content": "why"}]
ROWS = {
    "numbers": ({"prompt": 1, "chosen": 2, "rejected": 3}, "prompt (int), chosen (int), rej"),
    "a number": ({"prompt": "a", "chosen": "b", "rejected": 5}, "prompt (str), chosen (str), rej"),
    "zero": ({"prompt": "a", "chosen": "b", "rejected": 0}, "prompt (str), chosen (str), rej"),
    "true": ({"prompt": "a", "chosen": True, "rejected": "c"}, "prompt (str), chosen (bool), "),
    "text": ({"text": 5}, "text (int)"),
    "messages": ({"messages": 5}, "messages (int)"),
    "turns": ({"messages": [5]}, "messages (list)"),
    "string before turns": ({"prompt": "a", "completion": TURNS}, "prompt (str), completion (list"),
    "turns before string": ({"prompt": TURNS, "completion": "a"}, "prompt (list), completion (str"),
    "no row": ([5], "none"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": None}, "prompt (str)"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_something_else(name, tmp_path, folder, refused):
    row, got = ROWS[name]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, [{"text": "why"}, row])))
    line = refused("--model", folder, "--data", data)
    assert line.startswith("data: expected prompt with chosen and rejected or completion, or text")
    assert f" in {data} row 2, got {got}" in line


def test_texts_that_the_tokenizer_does_not_take(tmp_path, folder, refused):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "\\ud800"}')
    line = refused("--model", folder, "--data", data)
    assert line.startswith("data: expected texts that the tokenizer takes, got TypeError: ")


def test_strings_and_turns_are_both_counted(tmp_path, folder):
    from fastpo.planning.data import read_lengths

    data = tmp_path / "data.jsonl"
    turns = {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "because"}]}
    rows = [{"prompt": "why", "chosen": "because"}, {"text": "why"}, {"messages": TURNS}, turns]
    data.write_text("\n".join(map(json.dumps, rows)))
    found = read_lengths(data, folder)
    assert found.rows == 4 and found.prompt > 0 and found.answer > 0


def test_what_is_not_there_is_not_measured(folder, refused, monkeypatch):
    monkeypatch.setattr(measure, "alone", lambda *_: pytest.fail("it was begun"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = ["--model", folder, "--measure"]
    assert refused(*model) == "device: expected one that is there to measure, got cuda"

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(quantised, "import_module", missing)
    line = refused(*model, "--device", "cpu", "--load-in-4bit", "--lora")
    assert line == "measure: expected bitsandbytes for 4 bits, got none"
    line = refused(*model, "--device", "cpu", "--devices", "2")  # a step of one is no answer
    assert line == "devices: expected 1 to measure, got 2"


def test_memory_that_does_not_suffice_is_no_error(folder, monkeypatch):
    monkeypatch.setattr("fastpo.planning.setting.MOST_TOKENS", 2**60)
    config = AutoConfig.from_pretrained(folder)
    setting = Setting("tiny", device="cpu", context=64, batch=2**40)
    assert measure.measure(setting, config, "fastpo") == "out of memory"  # of words alone 1 PiB
    head = Head(Depths(replace(setting, batch=1), config, "fastpo").estimate())
    plan = StepPlan(setting, {"fastpo": replace(head, measured="out of memory")})
    assert re.search(r"^measured +out of memory$", str(plan), re.MULTILINE)
    assert json.loads(plan.as_json())["heads"]["fastpo"]["measured"] == "out of memory"


def test_a_step_that_fails_where_it_is_measured(folder, monkeypatch):
    def fails(function, job):
        raise RuntimeError("IndexError: index out\nof range")

    monkeypatch.setattr(measure, "alone", fails)
    expected = "^measure: expected a step that runs, got IndexError: index out of range$"
    with pytest.raises(ValueError, match=expected):
        measure.measure(Setting("tiny", device="cpu"), AutoConfig.from_pretrained(folder), "trl")


def _fails(why):
    if why == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3) if why == "ended" else torch.empty(2**60)


@pytest.mark.parametrize(("why", "memory"), [("killed", True), ("ended", False), ("full", True)])
def test_what_failed_for_memory(why, memory):
    with pytest.raises(RuntimeError) as error:
        fresh(_fails, why)
    assert for_memory(error.value) is memory


def test_errors_of_our_own_are_none_of_the_config(folder, monkeypatch):
    def breaks(self, **sizes):
        raise TypeError("ours")

    monkeypatch.setattr(Depths, "estimate", breaks)
    with pytest.raises(TypeError, match="ours"):
        cli.main(["plan", "--model", str(folder), "--context", "64"])
    with pytest.raises(torch.OutOfMemoryError), foreign("model: expected one"):
        raise torch.OutOfMemoryError

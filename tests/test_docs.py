"""The pages: their code runs, their commands are known, their links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
import sys
from argparse import Namespace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from _blocks import BLOCKS, PAGES, ROOT, anchors, commands, links

import fastpo
from fastpo import cli
from fastpo.integrations.run import USAGE

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYTHON = [block for block in BLOCKS if block.info.split()[:1] == ["python"]]
SHELL = [block for block in BLOCKS if not block.info]
# Blocks that cannot run here: `python unrun` on the page. Their number is known.
UNRUN: dict[str, int] = {}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    tiny = pytest.importorskip("_tiny")
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def names(checkpoint, tmp_path, mesh) -> dict[str, Any]:
    """What a page takes for given: a model, its inputs, rows to train on."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import _tiny
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    vocab = model.config.vocab_size
    labels = torch.randint(0, vocab, (4, 6))
    labels[:, :2] = -100
    pairs = _tiny.preferences()
    group = {"prompt": "why", "completions": ["because", "no"], "scores": [1.0, 0.0]}
    lm_head = torch.nn.Linear(16, vocab, bias=False)

    def config(kind: str, **options: Any) -> Any:
        """`DPOConfig(...)` of a reader, who has more to say."""
        own = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "bf16": False}
        return getattr(trl, kind)(**own, report_to="none", save_strategy="no", **options)

    def rollouts(_: Any, **options: Any) -> Any:
        few = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4}
        return config("GRPOConfig", **few, **options)

    return {
        "DPOConfig": lambda *rest, **options: config("DPOConfig", **options),
        "DPOTrainer": lambda *given, **options: trl.DPOTrainer(*given, **options),
        "GRPOConfig": lambda *rest, **options: rollouts(rest, **options),
        "GRPOTrainer": lambda *given, **options: trl.GRPOTrainer(
            *given, processing_class=_tiny.tokenizer(), **options
        ),
        "F": torch.nn.functional,
        "fastpo": fastpo,
        "groups": datasets.Dataset.from_list([group] * 4),
        "group": mesh.get_group(),
        "hidden": torch.randn(4, 6, 16, requires_grad=True),
        "input_ids": torch.randint(0, vocab, (4, 6)),
        "labels": labels,
        "lm_head": lm_head,
        "model": model,
        "pairs": pairs,
        "prompts": _tiny.prompts(),
        "reward": lambda completion_ids, **rest: [float(len(ids)) for ids in completion_ids],
        "ref_stats": fastpo.TokenStats(logps=torch.randn(4, 6)),
        "sampler_logps": -torch.rand(4, 6),
        "shard": lm_head.weight,
        "student": torch.randn(4, vocab, requires_grad=True),
        "teacher": torch.randn(4, vocab),
        "torch": torch,
        "vocab": vocab,
    }


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in PYTHON))
def test_code_runs(page, names):
    """Each block as it stands, those of a page one after the other."""
    if page == "docs/training.md":
        pytest.importorskip("trl", minversion="1.15")  # the first with objectives by name
    for block in PYTHON:
        if block.page != page or "unrun" in block.info:
            continue
        try:
            exec(compile(block.body, str(block), "exec"), names)
        finally:
            fastpo.unpatch()
        if "trainer" in names:
            names.pop("trainer").train()


def test_what_does_not_run_is_counted():
    """And it is Python; what it reads of fastpo is there."""
    unrun = [block for block in PYTHON if "unrun" in block.info]
    assert {b.page: sum(o.page == b.page for o in unrun) for b in unrun} == UNRUN
    for block in unrun:
        compile(block.body, str(block), "exec")
        assert set(re.findall(r"\bfastpo\.(\w+)", block.body)) <= set(dir(fastpo))


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_known(block):
    for command in commands(block):
        check(command)


def check(command: list[str]) -> None:
    """A command that its program would take, as far as that can be told without running it."""
    words = command[next(i for i, word in enumerate(command) if "=" not in word) :]
    program, rest = Path(words[0]).name, words[1:]
    checks = {"make": made, "fastpo": parsed, "pip": installed, "python": script}
    checks |= {"python3": script, "accelerate": launched, "torchrun": launched}
    assert program in checks, f"{' '.join(command)}: say ```text where it is no command"
    checks[program](rest)


def made(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets), words


def parsed(words: list[str]) -> None:
    if words[0] == "run":
        known = {"-m", *re.findall(r"--[\w-]+", USAGE)}
        assert words[1] in known or not words[1].startswith("-"), words
        return
    assert isinstance(cli._parser().parse_args(words), Namespace)


def installed(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = re.findall(r"\[([\w,]+)\]", " ".join(words))
    assert words[0] in ("install", "wheel")
    extras = [extra for part in asked for extra in part.split(",")]
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras), extras


def script(words: list[str]) -> None:
    assert words[0] in ("-c", "-m") or (ROOT / words[0]).exists(), words


def launched(words: list[str]) -> None:
    if "-m" in words:
        check(words[words.index("-m") + 1 :])
    else:
        assert (ROOT / next(word for word in words if word.endswith(".py"))).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_sentence_are_there(page):
    text = page.read_text(encoding="utf-8")
    made(re.findall(r"`make ([\w-]+)`", text))
    commands = set(re.findall(r"`fastpo ([a-z]\w*)\b", text))
    assert commands <= {"bench", "demo", "info", "objectives", "plan", "run"}


DOCUMENTS = [*PAGES, *sorted((ROOT / "docs" / "objectives").glob("*.md")), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_api_page_names_what_is_public():
    """And help() says the shapes of tensors."""
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    for name in named:
        member = reduce(getattr, name.split("."), fastpo)
        hints = getattr(member, "__annotations__", {}) if inspect.isfunction(member) else {}
        for argument, hint in hints.items():
            plain = "Tensor" in str(hint) and not re.search("float|Support", str(hint))
            if plain and argument != "return":
                said = rf"\b{argument}\b[^:\n]*: .*\["
                assert re.search(said, inspect.getdoc(member) or ""), f"{name}: {argument}"
    modules = {"objectives", "quantities"}
    families = {
        module.rpartition(".")[2] for module in sys.modules if "fastpo.objectives" in module
    }
    below = [("quantities", name) for name in ("padded", "packed", "Quantities")]
    below += [("objectives", x) for x in fastpo.objectives.__all__ if x not in families]
    public = {*fastpo.__all__} - modules | {f"{module}.{name}" for module, name in below}
    assert public == {*named} and len(named) == len({*named})


def test_the_first_screen_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_shows_the_report(theme):
    image = pytest.importorskip("PIL.Image")
    import readme_picture

    with image.open(ROOT / "docs" / "pictures" / f"head_{theme}.png") as picture:
        shown = json.loads(picture.text["Figures"])
    assert shown == readme_picture.figures(), "run: python docs/_ext/readme_picture.py"

"""`fastpo info`: what is there, what is not and why, and nothing is patched by asking."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastpo import cli, info
from fastpo.integrations.seams.seam import Replacement
from fastpo.ops import products
from fastpo.ops.rows import cpu, registry

pytest.importorskip("trl")
TRL_MODULE = "trl.trainer.dpo_trainer"


@pytest.fixture(scope="module")
def found():
    return info.facts()


def test_json_is_what_facts_says(found, capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_versions_and_devices(found):
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["fastpo"] == version("fastpo")
    assert set(found["devices"]) == set(found["backends"])
    assert found["devices"]["cpu"]["threads"] == torch.get_num_threads()
    own = found["devices"]["cpu"]["products"] == "fastpo's"
    assert own == bool(products.own_dtypes())


def test_every_backend_is_there_or_says_why_not(found):
    here = found["backends"]["cpu"]
    device = torch.device("cpu")
    assert here["unavailable"] == {x: registry.unavailable(x, device) for x in registry.BACKENDS}
    assert here["chosen"] == registry.choose(None, device)
    assert here["unavailable"]["torch"] is None
    assert "CUDA" in here["unavailable"]["cuda"]


def test_text_has_a_line_for_everything(found, capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"fastpo {version('fastpo')}, Python ")
    assert all(f"\n  {name} " in text for name in (*info.PACKAGES, *registry.BACKENDS, "cpu"))
    assert f"\n  {TRL_MODULE}: " in text
    assert found["extension"]["file"] is None or found["extension"]["file"] in text


def test_what_patch_would_take_over_is_what_it_takes_over(found):
    """Asked first, then done: the names in TRL's modules that hold something of ours."""
    from fastpo.integrations.trl.patch import SEAMS, patched

    def ours():
        seams = [seam for seam in SEAMS if seam.package == "trl"]
        return {(x.module, x.name) for x in seams if isinstance(x.current(), Replacement)}

    names = found["patch"]["names"]
    assert found["patch"]["how"] == "seams" and found["patch"]["unfit"] == {}
    assert ours() == set()
    with patched():
        assert ours() == {(module, name) for module in names for name in names[module]}


def test_a_seam_that_has_changed_is_named(monkeypatch):
    from trl import DPOTrainer

    monkeypatch.setattr(DPOTrainer, "_compute_loss", lambda self, everything: None)
    patch = info.facts()["patch"]
    assert (
        "expected (model, inputs, return_outputs), got (everything)" in patch["unfit"][TRL_MODULE]
    )


def test_without_trl(monkeypatch):
    monkeypatch.setattr(info, "installed", lambda name: None)
    found = info.facts()
    assert found["patch"]["reason"] == "trl is not installed"
    text = info.text(found)
    assert "\n  trl           not installed\n" in text
    assert text.endswith("\n  trl is not installed")


def test_an_older_trl_is_served_by_lazy_logits(monkeypatch):
    from fastpo.integrations.seams import seam

    monkeypatch.setattr(seam.metadata, "version", lambda name: "0.24.0")
    patch = info.facts()["patch"]
    assert patch["how"] == "lazy logits" and patch["names"] == {}
    assert "trl: expected version 1.13 or" in patch["reason"]


def test_without_the_extension(monkeypatch):
    why = "fastpo._C is not there (for a test)"
    monkeypatch.setattr(info, "compiled", lambda: (None, why))
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_MISSING", why)
    found = info.facts()
    assert found["extension"]["reason"] == found["backends"]["cpu"]["unavailable"]["cpu"] == why
    assert found["backends"]["cpu"]["chosen"] == "torch"
    assert (
        f"Extension\n  {why}\n  Without it CPUs run plain PyTorch, and GPUs Triton's kernels.\n"
        in info.text(found)
    )


def test_an_issue_asks_for_it():
    root = Path(__file__).parents[2]
    if not (root / ".github").is_dir():
        pytest.skip("not a checkout")
    assert "`fastpo info`" in (root / ".github/ISSUE_TEMPLATE/bug.yml").read_text()

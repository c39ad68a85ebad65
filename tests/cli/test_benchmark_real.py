"""benchmarks/real_model.py: its truth, its summary, and what it leaves out when it goes on."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from fastpo import reference
from fastpo.testing import make_head

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    if not SCRIPTS.is_dir():
        pytest.skip("not a checkout")
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("real_model")


def test_the_truth_is_in_float64_whatever_the_blocks(script):
    head = make_head(7, 50, 16)
    wide = head.like(torch.float64, grad=False)
    expected = reference.linear_logps(wide.hidden, wide.weight, wide.labels).logps
    for block in (3, 256):
        found = script.truth(head, block)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, check_dtype=False)


def test_losses_are_compared_with_trls_in_float32(script):
    rows = [
        {"dtype": "bfloat16", "head": "fastpo", "losses": [0.5, 0.25]},
        {"dtype": "float32", "head": "trl", "losses": [0.5, 0.5]},
    ]
    assert script.summary(rows[:1]) == []
    gaps = {"largest": 0.25, "mean": 0.125, "last": 0.25}
    assert script.summary(rows)[0] == {"dtype": "bfloat16", "head": "fastpo", **gaps}


def test_what_the_report_has_is_not_run_again(script):
    made = {"errors": [{"dtype": "float32"}], "drift": [{"dtype": "bfloat16", "head": "trl"}]}
    made["steps"] = [{"head": "trl"}]
    left = [("errors", "bfloat16")]
    left += [("drift", *run) for run in (("float32", "fastpo"), ("float32", "trl"))]
    left += [("drift", "bfloat16", "fastpo")]
    assert script.missing(made, None) == left
    assert script.missing(made, Path("pairs.jsonl")) == [*left, ("steps", "fastpo")]

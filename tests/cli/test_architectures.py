"""The survey of causal models: benchmarks/architectures, and its table in the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers

from fastpo.bench.readme import render
from fastpo.bench.report import read

RUN = Path(__file__).parents[2] / "benchmarks" / "architectures" / "run.py"
KINDS = ("llama", "gemma2", "granite", "xlstm", "bart", "blt")


def test_models_are_compared_in_every_way(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, RUN, "--types", *KINDS, "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    rows = {row["type"]: row for row in json.loads(out.read_text())["rows"]}
    assert tuple(rows) == KINDS
    for kind in ("llama", "gemma2", "granite"):
        served = {name: rows[kind][name] for name in ("model", "lazy", "attach", "shared")}
        assert served == {"model": "built", "lazy": "same", "attach": "same", "shared": "same"}
        assert 0 < rows[kind]["largest"] < 1e-5
    assert rows["xlstm"]["lazy"] == rows["xlstm"]["attach"] == "same"
    assert rows["xlstm"]["shared"] == "a state along the row"
    assert rows["bart"]["lazy"] == "same" and "fails on a probe" in rows["bart"]["attach"]
    assert "parameters" in rows["blt"]["model"]
    table = render(read(out), out.name)
    assert table.startswith(f"5 of 6 types of transformers {transformers.__version__}, float32;")
    assert "| yes | yes | yes | llama, gemma2, granite |" in table
    assert "| yes | yes | a state along the row | xlstm |" in table
    assert "| yes | refused | attention that is not causal | bart |" in table
    assert "| not compared | | | blt |" in table


def test_what_differs_is_said():
    row = {"type": "x", "model": "built", "lazy": "same", "attach": "same", "shared": "same"}
    others = {"lazy": "differs by 2.0e-01", "attach": "RuntimeError: no", "shared": "off 3.1e-02"}
    made = {
        "what": "architectures",
        "created": "2026-11-30",
        "device": "a CPU",
        "capability": "",
        "threads": 1,
        "load_average": [0, 0, 0],
        "versions": {"torch": "2", "trl": None, "liger_kernel": None, "transformers": "5"},
        "rows": [row | {"largest": 3e-6}, row | others | {"type": "y", "largest": 0.2}],
    }
    table = render(made, "made.json")
    assert "largest difference 2e-01 of the largest gradient" in table
    assert "| yes | yes | yes | x |" in table
    assert "| differs by 2.0e-01 | refused | off … | y |" in table

"""The smoke run of a GPU: what it does with a case that takes its process along."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_smoke.py"
WORKER = """
import json, os, sys
backend, first = sys.argv[2], int(sys.argv[4])
for i in range(first, {cases}):
    if i in {deadly}:
        os._exit(7)
    row = {{"backend": backend, "index": i, "status": "ok", "seconds": 0.0}}
    print(json.dumps(row), flush=True)
"""


@pytest.fixture
def smoke(monkeypatch):
    if not SCRIPT.is_file():
        pytest.skip("not a checkout")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module(SCRIPT.stem)


def followed(smoke, monkeypatch, folder, deadly, backends=("torch",)):
    """The report of workers that die at some cases."""
    worker, out = folder / "worker.py", folder / "smoke.json"
    worker.write_text(WORKER.format(cases=len(smoke.cases("torch")), deadly=deadly))
    monkeypatch.setattr(smoke, "__file__", str(worker))
    record = smoke.Record.of(out, list(backends))
    for backend in backends:
        record.follow(backend)
    return json.loads(out.read_text())


def test_a_deadly_case_costs_itself(smoke, monkeypatch, tmp_path):
    made = followed(smoke, monkeypatch, tmp_path, deadly=(3, 5))
    statuses = [row["status"] for row in made["rows"]]
    expected = ["ok"] * len(smoke.cases("torch"))
    expected[3] = expected[5] = "died"
    assert statuses == expected
    assert made["rows"][3]["reason"] == "exit code 7"
    assert made["passed"] == []


def test_a_backend_that_cannot_start_is_left(smoke, monkeypatch, tmp_path):
    made = followed(smoke, monkeypatch, tmp_path, deadly=range(1000))
    assert [row["status"] for row in made["rows"]] == ["died"] * 3


def test_backends_looked_at_later_join_the_report(smoke, monkeypatch, tmp_path):
    followed(smoke, monkeypatch, tmp_path, deadly=(3,), backends=("torch", "cpu"))
    made = followed(smoke, monkeypatch, tmp_path, deadly=(), backends=("torch",))
    assert made["passed"] == ["torch"]
    assert {row["backend"] for row in made["rows"]} == {"torch", "cpu"}


def test_what_is_not_there_is_refused(smoke, monkeypatch, tmp_path):
    monkeypatch.setattr(smoke.registry, "unavailable", lambda *_: "built without it")
    made = followed(smoke, monkeypatch, tmp_path, deadly=())
    assert made["rows"] == [{"backend": "torch", "status": "refused", "reason": "built without it"}]

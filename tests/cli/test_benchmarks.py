"""The scripts of benchmarks/: a smoke run's dying cases, the clock of `make bench`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
WORKER = """
import json, os, sys
backend, first = sys.argv[2], int(sys.argv[4])
for i in range(first, {cases}):
    if i in {deadly}:
        os._exit(7)
    row = {{"backend": backend, "index": i, "status": "ok", "seconds": 0.0}}
    print(json.dumps(row), flush=True)
"""


def script(name: str, monkeypatch):
    if not SCRIPTS.is_dir():
        pytest.skip("not a checkout")
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def smoke(monkeypatch):
    return script("gpu_smoke", monkeypatch)


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


def test_a_moment_on_a_gpu_begins_behind_a_head_start(monkeypatch):
    """Milliseconds of the device: 5 of a head start, 7 of work."""
    now = 0.0

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now

        def synchronize(self):
            assert self.at is not None

        def elapsed_time(self, later):
            return later.at - self.at

    def sleep(cycles):
        nonlocal now
        now += 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    moment = script("conftest", monkeypatch).Moment
    start = moment()
    now += 7.0
    assert moment() - start == pytest.approx(7e-3)


def test_a_candidate_stands_in_while_it_runs(monkeypatch):
    pytest.importorskip("triton")
    tune = script("gpu_tune", monkeypatch)
    monkeypatch.setattr(tune.registry, "unavailable", lambda *_: None)
    found = {name: (backend, changes) for name, backend, changes in tune.candidates()}
    schedules = [changes for backend, changes in found.values() if backend == "cutlass"]
    assert len(schedules) == 8 and len(found) == len(tune.candidates())
    shipped = tune.anchored_cutlass.schedule()
    assert shipped._asdict() in schedules
    with tune.standing_in(*found["cooperative, swizzle 1, rows first"]):
        assert tune.anchored_cutlass.schedule() == (False, 1, False)
    assert tune.anchored_cutlass.schedule() == shipped


def test_cutlass_is_looked_at_in_both_schedules(smoke):
    cooperative = [case for case in smoke.cases("cutlass") if ("pingpong", False) in case.options]
    assert {case.mode for case in cooperative} == set(smoke.MODES)
    assert not any("pingpong" in str(case) for case in smoke.cases("anchored"))

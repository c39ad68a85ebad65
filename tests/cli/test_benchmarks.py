"""The scripts of benchmarks/: a smoke run's dying cases, the clock of `make bench`."""

from __future__ import annotations

import collections
import importlib
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastpo.bench.errors import DeviceLost

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


def test_what_no_benchmark_needs_may_be_wrong(smoke, monkeypatch, tmp_path):
    (case,) = [i for i, c in enumerate(smoke.cases("torch")) if str(c).endswith("lean support 20")][
        :1
    ]
    made = followed(smoke, monkeypatch, tmp_path, deadly=(case,))
    assert made["rows"][case]["status"] == "died" and made["passed"] == ["torch"]


def test_a_case_that_hangs_ends_its_process(smoke):
    program = (
        "import time, gpu_smoke as s; s.STARTING = 2; s.check = lambda *_: time.sleep(600);"
        "s.work('torch', 0)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and not done.stdout and "in work" in done.stderr
    assert time.monotonic() - start < 300


@pytest.mark.parametrize(
    ("words", "gone", "done"),
    [
        ("Triton Error [CUDA]: an illegal memory access was encountered", True, 1),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx", False, 3),
    ],
)
def test_a_worker_ends_where_its_device_is_gone(smoke, words, gone, done):
    program = f"""
import gpu_smoke as s
def fail(*_): raise RuntimeError({words!r})
s.DEVICE, s.check, s.cases = "cuda", fail, lambda _: range(3)
s.torch.cuda.synchronize = fail if {gone} else lambda: None
s.work("torch", 0)"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == (smoke.LOST if gone else 0)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [(row["index"], row["status"]) for row in rows] == [(i, "error") for i in range(done)]


def test_a_large_case_leaves_no_memory_to_its_process():
    """Other processes' cases want it: one that finds none is an error, and its backend is out."""
    program = """
import gpu_smoke as s
held = [2**20, 26 * 10**9, 2**20]
s.DEVICE, s.check, s.cases = "cuda", lambda *_: ({}, 0.0), lambda _: range(3)
s.torch.cuda.memory_reserved = lambda: held.pop(0)
s.torch.cuda.empty_cache = lambda: print('"given back"')
s.work("torch", 0)"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, timeout=300
    )
    said = [json.loads(line) for line in found.stdout.splitlines()]
    assert [x if isinstance(x, str) else x["index"] for x in said] == [0, 1, "given back", 2]


@pytest.mark.parametrize(("quiet", "status"), [(0, "hung"), (1000, "unfinished")])
def test_an_interrupted_run_says_what_did_not_end(smoke, monkeypatch, tmp_path, quiet, status):
    worker, out = tmp_path / "worker.py", tmp_path / "smoke.json"
    waits = WORKER.replace("os._exit(7)", "__import__('time').sleep(600)")
    worker.write_text(waits.format(cases=len(smoke.cases("torch")), deadly=(3,)))
    monkeypatch.setattr(smoke, "__file__", str(worker))
    monkeypatch.setattr(smoke, "QUIET", quiet)
    record = smoke.Record.of(out, ["torch"])
    thread = threading.Thread(target=record.follow, args=("torch",))
    thread.start()
    while len(record.rows) < 3:
        time.sleep(0.01)
    record.stop()
    thread.join(60)
    assert not thread.is_alive()
    made = json.loads(out.read_text())
    assert [row["status"] for row in made["rows"]] == ["ok"] * 3 + [status]
    assert made["passed"] == ["torch"] * (status == "unfinished")


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


@pytest.mark.parametrize("end", [KeyboardInterrupt, DeviceLost])
def test_interrupted_tuning_keeps_the_turns_that_were_done(end, monkeypatch):
    pytest.importorskip("triton")
    tune = script("gpu_tune", monkeypatch)
    calls, candidate = [], ("as shipped", "anchored", {})

    def forward(x, candidate, mode):
        calls.append(mode)
        if len(calls) == 6:  # two a turn, the first of which warms up
            raise end
        return torch.zeros(len(x.labels))

    monkeypatch.setattr(tune, "forward", forward)
    monkeypatch.setattr(tune, "complaints", lambda x, found: [None for _ in found])
    rows, given = [], tune.one_head((16, 96, 16), [candidate], 7)
    with pytest.raises(end):
        collections.deque((rows.append(row) for row in given), maxlen=0)
    assert [(row["mode"], len(row["runs_ms"])) for row in rows] == [("score", 2), ("keep", 1)]


def test_tuning_does_not_wait_for_a_candidate_that_hangs(monkeypatch):
    pytest.importorskip("triton")
    tune = script("gpu_tune", monkeypatch)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        hangs = pool.apply_async(time.sleep, (600,))
        assert tune.answer(hangs, 0.01) == "not compiled and run once within 30 s"
        assert tune.answer(hangs, -1.0) is not None


def test_cutlass_is_looked_at_in_both_schedules(smoke):
    cooperative = [case for case in smoke.cases("cutlass") if ("pingpong", False) in case.options]
    assert {case.mode for case in cooperative} == set(smoke.MODES)
    assert not any("pingpong" in str(case) for case in smoke.cases("anchored"))

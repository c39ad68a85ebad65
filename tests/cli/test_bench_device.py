"""A GPU in a benchmark: its clock, and what is left of a run that loses it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from _bench import bench

from fastpo.bench import head, machine, process
from fastpo.bench.variants import Variant, eager


def test_a_lost_device_ends_the_run_and_leaves_what_was_measured(monkeypatch, tmp_path, capsys):
    """As after an illegal access: the call fails, and so does whatever asks the device again."""

    def breaks():
        def forward(x):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return forward

    def release(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    made = [Variant("breaks", case, breaks) for case in ("score", "frozen")]
    monkeypatch.setattr(head, "rival_variants", lambda: made)
    monkeypatch.setattr(head, "_release", release)
    arguments = ("--shapes", "16,100,8", "--device", "cpu", "--variants", "eager,breaks")
    code, made = bench("head", *arguments, out=tmp_path / "h.json")
    assert code == 3
    assert "the device was lost: breaks, score: RuntimeError: CUDA" in capsys.readouterr().err
    rows = {(row["variant"], row["case"]): row for row in made["rows"]}
    assert rows["eager", "score"]["status"] == "ok" and rows["eager", "score"]["errors"]
    assert rows["breaks", "score"]["status"] == "refused"
    assert [key for key, row in rows.items() if row.get("lost")] == [("breaks", "score")]
    assert rows["breaks", "frozen"]["status"] == "left out"


def test_what_the_host_takes_is_not_the_devices_time(monkeypatch):
    """The device is busy when the clock starts, so the host's calls lie before its work."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            self.name = "end" if "new" in said else "start"
            said.append("new")

        def record(self):
            said.append(f"{self.name} recorded")

        def query(self):
            said.append(f"{self.name} asked")
            return said.count("end asked") > 2

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("busy"))
    took, result = machine.stopwatch("cuda")(lambda: said.append("called") or 7)
    recorded = ["idle", "busy", "start recorded", "called", "end recorded"]
    assert said[2:] == [*recorded, *3 * ["end asked"]]
    assert took.ms == 1.5 and took.host_ms < 1000 and result == 7


def test_a_kernel_that_hangs_is_a_lost_device(monkeypatch, tmp_path, capsys):
    """Nobody asks the device again, which would wait for ever."""

    class Event:
        def query(self):
            return False

    def stopwatch(device):
        def watch(function):
            result = function()
            if said:
                machine._wait(Event())
            return machine.Took(1.0, 1.0), result

        return watch

    said = []
    hangs = Variant("hangs", "score", lambda: lambda x: said.append("called") or eager(x))
    monkeypatch.setattr(machine, "_PATIENCE", 0.01)
    monkeypatch.setattr(machine, "stopwatch", stopwatch)
    monkeypatch.setattr(head, "rival_variants", lambda: [hangs])
    monkeypatch.setattr(head, "_release", lambda device: pytest.fail("waits for ever"))
    arguments = ("--shapes", "16,100,8", "--device", "cpu", "--variants", "eager,hangs")
    code, made = bench("head", *arguments, out=tmp_path / "h.json")
    assert code == process.LOST
    assert "hangs, score: DeviceLost: hangs: no answer" in capsys.readouterr().err
    assert [row["variant"] for row in made["rows"] if row.get("lost")] == ["hangs"]


def test_leaving_a_lost_device_frees_nothing():
    code = "import atexit; atexit.register(print, 'freed'); from fastpo.bench import process; "
    for number, said in ((process.LOST, "told\n"), (1, "told\nfreed\n")):
        command = [sys.executable, "-c", f"{code}print('told'); process.leave({number})"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (found.returncode, found.stdout) == (number, said)

"""The benchmarks at tiny sizes: what they write, what they refuse, and that they judge first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _bench import bench

from fastpo import cli
from fastpo.bench import head, machine, process, shapes, sweep
from fastpo.bench.check import judge
from fastpo.bench.rivals import rival_variants
from fastpo.bench.shapes import Shape
from fastpo.bench.step import batches, loop
from fastpo.bench.variants import CASES, Outcome, Variant, eager, own_variants, run

ROOT = Path(__file__).parents[2]
SHAPE = Shape(16, 100, 8)


def options(**changes):
    return head.HeadOptions((SHAPE,), repeats=2, memory=False, **changes)


def run_head(chosen):
    kept = []
    made = head.bench(chosen, lambda _: None, kept.append)
    assert kept[-1] is made
    return made


def test_head_measures_every_case(tmp_path, capsys):
    arguments = ("--shapes", "16,100,8", "--repeats", "2", "--no-memory", "--device", "cpu")
    code, made = bench("head", *arguments, "--variants", "fastpo,eager", out=tmp_path / "h.json")
    assert code == 0
    assert made["arguments"]["shapes"] == ["16,100,8"]
    assert made["versions"]["torch"] == torch.__version__
    assert len(made["load_average"]) == 3
    timed = [row for row in made["rows"] if "median_ms" in row]
    assert {row["case"] for row in timed} == set(CASES)
    assert {row["variant"] for row in timed} >= {"eager", "fastpo torch", "fastpo torch keep"}
    floor = made["shapes"][0]["floor_ms"]
    for row in timed:
        assert len(row["runs_ms"]) == 2
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["products"] == pytest.approx(row["median_ms"] / floor["score"])
        assert row["fraction_of_floor"] == pytest.approx(floor[row["case"]] / row["median_ms"])
    printed = capsys.readouterr().out
    assert "N 16, V 100, H 8" in printed
    assert "fastpo cuda (score, frozen) refused: " in printed


def test_check_times_nothing(capsys):
    arguments = ["--shapes", "16,100,8", "--check", "--variants", "eager", "--device", "cpu"]
    assert cli.main(["bench", "head", *arguments]) == 0
    assert "checked" in capsys.readouterr().out


def test_a_rival_that_refuses_is_shown(monkeypatch):
    def missing():
        raise ImportError("no such rival\nand a long tail")

    def breaks():
        def forward(x):
            raise RuntimeError("expected CUDA")

        return forward

    rivals = [Variant("absent", "score", missing), Variant("broken", "frozen", breaks)]
    monkeypatch.setattr(head, "rival_variants", lambda: rivals)
    rows = run_head(options(variants=("absent", "broken")))["rows"]
    assert [row["status"] for row in rows] == ["refused"] * 2
    assert [row["reason"] for row in rows] == [
        "ImportError: no such rival",
        "RuntimeError: expected CUDA",
    ]


@pytest.mark.parametrize("own", [True, False])
def test_wrong_log_probabilities_of_ours_are_not_timed(own, monkeypatch):
    def off(x):
        return Outcome(eager(x).logps + 1e-3)

    variant = Variant("off", "trainable", lambda: off, own=own)
    monkeypatch.setattr(head, "rival_variants", lambda: [variant])
    (row,) = run_head(options(variants=("off",)))["rows"]
    assert row["errors"]["logps"] == pytest.approx(1e-3, rel=0.01)
    assert row["status"] == ("wrong" if own else "ok")
    assert ("median_ms" in row) != own


INTERRUPTED = """
import os, signal, time
from fastpo.bench.process import one_interrupt
one_interrupt()
for _ in range(2):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGINT)
        print("written")
        time.sleep(1.1)
"""


def test_an_interrupt_that_comes_twice_is_one():
    """As `timeout` sends it; a later one is another."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "written\n" * 2, done.stderr


def test_an_interrupted_shape_keeps_its_turns(monkeypatch):
    turns = []

    def patient(x):
        turns.append(x)
        if len(turns) == 4:  # the check, the warm-up, one turn
            raise KeyboardInterrupt
        return eager(x)

    variant = Variant("patient", "score", lambda: patient)
    monkeypatch.setattr(head, "rival_variants", lambda: [variant])
    kept = []
    with pytest.raises(KeyboardInterrupt):
        head.bench(options(variants=("patient",)), lambda _: None, kept.append)
    (row,) = kept[-1]["rows"]
    assert len(row["runs_ms"]) == 1 and row["products"] > 0


def test_wrong_gradients_of_ours_are_not_timed(monkeypatch):
    def off(x):
        logps = eager(x).logps
        return Outcome(logps.detach() + 1.01 * (logps - logps.detach()))

    monkeypatch.setattr(
        head, "rival_variants", lambda: [Variant("off", "frozen", lambda: off, True)]
    )
    (row,) = run_head(options(variants=("off",)))["rows"]
    assert row["status"] == "wrong"
    assert row["reason"].startswith("dhidden: error ")


@pytest.mark.parametrize(
    "name", ["trl", "liger scaled ce", "liger dpo", "torch linear_ce", "torch linear_ce 256"]
)
def test_rivals_compute_what_they_are_compared_with(name):
    problem = head.make_problem(SHAPE, "cpu", torch.float32, copies=False)
    judged = judge(problem.sets[0], problem.upstream)
    for variant in (v for v in rival_variants() if v.name == name):
        try:
            forward = variant.make()
        except (ImportError, RuntimeError) as error:
            pytest.skip(str(error))
        errors = judged.errors(run(variant, forward, problem.sets[0], problem.upstream))
        assert max(errors.values()) < 1e-5, variant.case


def test_trls_head_trains_without_datasets():
    pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
    program = """
import sys, torch
sys.modules["datasets"] = None  # as if it were not installed
from fastpo.bench import head, rivals, variants
x = head.make_problem(head.Shape(8, 50, 4), "cpu", torch.float32, copies=False)
for trl in (v for v in rivals.rival_variants() if v.name == "trl"):
    result = variants.run(trl, trl.make(), x.sets[0], x.upstream)
print(*result.grads)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "dhidden dweight\n", done.stderr[-3000:]


def test_own_variants_keep_the_rule():
    problem = head.make_problem(Shape(24, 333, 16), "cpu", torch.float32, copies=False)
    judged = judge(problem.sets[0], problem.upstream)
    for variant in own_variants(torch.device("cpu")):
        if variant.name.startswith("fastpo torch"):
            result = run(variant, variant.make(), problem.sets[0], problem.upstream)
            assert judged.complaint(judged.errors(result), torch.float32) is None


def test_memory_has_a_process_of_its_own():
    extra = process.fresh(head.extra_mib_alone, "eager", "score", Shape(512, 4096, 8), "float32")
    assert 8 < extra < 64  # 512 x 4096 float32 are 8 MiB; eager holds two of them


def test_what_a_process_raises_is_raised():
    with pytest.raises(RuntimeError, match="TypeError: "):
        process.fresh(machine.facts)


def test_a_process_that_dies_is_said():
    with pytest.raises(process.Died, match="ended with code 3"):
        process.fresh(os._exit, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="a process group")
def test_an_interrupt_ends_a_measurement_without_a_traceback(tmp_path):
    job = "import time; print('begun', flush=True); time.sleep(600)"
    (tmp_path / "program.py").write_text(
        "import signal\n"
        "from fastpo.bench.process import fresh\n"
        "if __name__ == '__main__':\n"
        # In a background job interrupts are ignored, and so they would be here.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    try:\n"
        f"        fresh(exec, {job!r})\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True)\n"
    )
    command = [sys.executable, str(tmp_path / "program.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, text=True, **pipes) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "begun\n"
        os.killpg(running.pid, signal.SIGINT)
        try:
            assert running.communicate(timeout=120) == ("interrupted\n", "")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def test_what_a_measurement_on_a_gpu_raises_is_raised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    job = loop.Job("eager", "tiny", "cuda", "float32", 1, 8, 1, False, 1, batches.Texts(), "wall")
    with pytest.raises(RuntimeError, match="KeyError: 'cuda'"):
        process.alone(lambda job: {}[job.device], job)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head", "--shapes", "nothing"], "--shapes: expected readme, "),
        (["head", "--shapes", "1,2,0"], "--shapes: expected three numbers of 1 to 16777216, got"),
        (["head", "--shapes", "9" * 30 + ",2,1"], "--shapes: expected three numbers of 1 to 16"),
        (["head", "--repeats", "0"], "--repeats: expected an integer >= 1, got 0"),
        (["head", "--threads", "0"], "--threads: expected an integer >= 1, got 0"),
        (["head", "--threads", "9" * 9], f"--threads: expected at most {os.cpu_count()}, the c"),
        (["step", "--threads", "9" * 30], f"--threads: expected at most {os.cpu_count()}, the c"),
        (["step", "--lengths", "9" * 30], "--lengths: expected integers <= 1048576, got 99999"),
        (["sweep", "--rows", "9" * 16, "--width", "1"], "bench sweep: error: out of memory"),
        (["head", "--slow", "nan"], "--slow: expected a number >= 0, got nan"),
        (["head", "--slow", "-1"], "--slow: expected a number >= 0, got -1.0"),
        (["head", "--time-limit", "nan"], "--time-limit: expected a number >= 1, got nan"),
        (["head", "--variants", "eager,nothing"], ", got 'nothing'"),
        (["head", "--variants", ""], "--variants: expected names as A,B, got ''"),
        (["head", "--cases", "score", "--variants", "quack"], ", got 'quack'"),
        (["head", "--out", "."], "--out: expected a file to write, got the folder '.'"),
        (["head", "--out", ""], "--out: expected a file to write, got the folder '.'"),
        (["head", "--out", "/dev/null/h.json"], "--out: expected a file in a folder to write to, "),
        (["step", "--out", "."], "--out: expected a file to write, got the folder '.'"),
        (["sweep", "--out", "."], "--out: expected a file to write, got the folder '.'"),
        (["sweep", "--time-limit", "-5"], "--time-limit: expected a number >= 1, got -5.0"),
        (["step", "--steps", "0"], "--steps: expected an integer >= 1, got 0"),
        (["step", "--rounds", "0"], "--rounds: expected an integer >= 1, got 0"),
        (["step", "--memory-limit", "0"], "--memory-limit: expected an integer >= 1, got 0"),
        (["step", "--memory-limit", "-1"], "--memory-limit: expected an integer >= 1, got -1"),
        (["step", "--time-limit", "-5"], "--time-limit: expected a number >= 1, got -5.0"),
        (["step", "--variants", ""], "--variants: expected names as A,B, got ''"),
        (["step", "--model", "nothing"], "--model: expected one of tiny, small, "),
        (["step", "--variants", "nothing"], "--variants: expected some of eager, fastpo, fast"),
        (["step", "--shared-prompts", "4"], "--shared-prompts: expected P:C[,equal][,K] with K"),
        (["step", "--shared-prompts", "1:1,3"], "1 or even, got '1:1,3'"),
        (["step", "--shared-prompts", "1:1,8", "--pairs", "2"], "--pairs: expected 4 for 8 rows"),
        (["plot", "no.json"], "no.json: No such file or directory"),
        (["readme", "no.md"], "no.md: No such file or directory"),
    ],
)
def test_what_was_given_wrong_is_said_in_one_line(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    device = ["--device", "cpu"] if arguments[0] in ("head", "step") else []
    assert cli.main(["bench", *arguments, *device]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_read_once_each():
    assert shapes.parse(["readme", "1024,151936,896"]) == [Shape(1024, 151_936, 896)]
    assert len(shapes.parse(["h200"])) == 8


def test_a_shape_that_is_too_large_costs_itself(monkeypatch):
    made = head.make_problem

    def in_memory(shape, *arguments, **options):
        if shape.tokens > 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return made(shape, *arguments, **options)

    monkeypatch.setattr(head, "make_problem", in_memory)
    sizes = Shape(17, 64, 8), Shape(16, 64, 8)
    wanted = replace(options(variants=("eager",)), shapes=sizes)
    report = run_head(wanted)
    assert report["left_out"] == [{"shape": sizes[0]._asdict(), "reason": "out of memory"}]
    assert {row["tokens"] for row in report["rows"]} == {16}


def test_sweep_compares_tiles(tmp_path, capsys):
    small = ("--rows", "4", "--width", "32", "--repeats", "1")
    code, made = bench("sweep", *small, out=tmp_path / "w.json")
    assert code == 0
    statuses = {row["variant"]: row["status"] for row in made["rows"]}
    assert statuses["torch"] == "ok"
    assert any(name.startswith("triton") for name in statuses)
    assert "wrong" not in statuses.values()


def test_a_sweep_is_kept_kernel_by_kernel_and_ends_in_time(monkeypatch):
    hours = iter(range(10))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: 3600.0 * next(hours))
    kept = []
    sizes = {"rows": 4, "width": 32, "repeats": 1, "time_limit": 5400.0}
    made = sweep.bench("cpu", **sizes, keep=lambda made: kept.append(len(made["rows"])))
    assert len(kept) == 1 and kept[0] == len(made["rows"])
    assert [each["kernel"] for each in made["left_out"]] == list(sweep.KERNELS)[1:]

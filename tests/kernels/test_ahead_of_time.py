"""Every Triton kernel compiles for GPUs that are not here, within their registers and memory.

`make triton` asks the same of the Triton that torch 2.11 brings; FASTPO_SM=90 only of those GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

PREDICTED = Path(__file__).parents[2] / "benchmarks" / "results" / "h100_predicted.json"
KERNELS = ["forward", "backward", "rescale", "finish", "row_grads", "anchored_label", "word"]
PRODUCTS = ("pointers", "descriptors", "beside", "again")
KERNELS += [*PRODUCTS, "fold", "target"]
KERNELS += ["pair softmaxes", "pair values", "pair gradients"]
ONLY_ON = {"descriptors": {90}, "beside": {80, 90}}
# Bytes one program may have.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ASKED = [int(sm) for sm in os.environ.get("FASTPO_SM", "").split()] or list(SHARED_MEMORY)
of_hopper = pytest.mark.skipif(90 not in ASKED, reason="FASTPO_SM asks for other GPUs")

# What a release of Triton does worse than 3.7: bytes a thread spills, all of them beside every
# statistic or in kernels that wait for memory, and how many times its instructions a cell takes.
SPILLED = {
    "3.4": {("descriptors", 90): 16, ("pair softmaxes", 90): 8, ("pair softmaxes", 100): 8},
    "3.5": {("descriptors", 90): 8},
    "3.6": {("descriptors", 90): 8},
    "3.8": {("forward", 80): 8},
    "3.9": {("descriptors", 90): 72, ("pair softmaxes", 80): 24, ("pair softmaxes", 90): 40},
}
MORE_INSTRUCTIONS = {"3.4": 1.035, "3.5": 1.05, "3.8": 1.01}
RELEASE = triton.__version__[:3]
# ptxas keeps the pairs' to 80 registers on consumer Blackwell.
SPILLS = {("pair softmaxes", 120): 40} | SPILLED.get(RELEASE, {})


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """What _aot.py reports. A process of its own: here, the kernels may be interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(Path(__file__).with_name("_aot.py")), *map(str, ASKED)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("sm", ASKED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fits_the_gpu(compiled, kernel, sm):
    found = [x for x in compiled if x["sm"] == sm and x["name"].startswith(kernel)]
    assert found or sm not in ONLY_ON.get(kernel, SHARED_MEMORY)
    for x in found:
        assert x["local"] == 0 and x["stack"] <= SPILLS.get((kernel, sm), 0), f"spills: {x}"
        assert x["shared"] <= SHARED_MEMORY[sm], x


def test_products_run_on_the_matrix_units(compiled):
    found = [x for x in compiled if x["name"].startswith(PRODUCTS)]
    assert found
    for x in found:
        assert x[{90: "hgmma", 100: "utchmma"}.get(x["sm"], "hmma")] > 0, x


@of_hopper
@pytest.mark.parametrize(
    ("stats", "kept", "instructions"),
    [(0, "no", 5.1), (0, "bf16", 10.5), (13, "no", 8.7), (13, "bf16", 14.2)],
)
def test_instructions_per_cell_of_the_epilogue(compiled, stats, kept, instructions):
    """A thread has 128 cells, and a multiprocessor 16 exponentials a clock: up to 8 are hidden."""
    name = f"descriptors 512x128256x4096 bf16 stats={stats} kept={kept}"
    (found,) = [x for x in compiled if x["name"] == name]
    assert found["utmaldg"] >= 2 and found["hgmma"] == 4, "one k-step, unrolled"
    assert 3 < found["epilogue"] / 128 <= instructions * MORE_INSTRUCTIONS.get(RELEASE, 1)


@of_hopper
@pytest.mark.skipif(not PREDICTED.is_file(), reason="not a checkout")
@pytest.mark.parametrize(
    ("case", "stats", "kept"), [("score", 0, "no"), ("statistics", 13, "no"), ("keep", 0, "bf16")]
)
def test_what_is_predicted_is_of_these_kernels(compiled, case, stats, kept):
    name = f"descriptors 512x128256x4096 bf16 stats={stats} kept={kept}"
    (found,) = [x for x in compiled if x["name"] == name]
    predicted = json.loads(PREDICTED.read_text(encoding="utf-8"))
    if predicted["versions"]["triton"] != triton.__version__:
        pytest.skip("predicted with another Triton")
    (row,) = [
        x
        for x in predicted["rows"]
        if (x["hidden"], x["case"], x["backend"]) == (4096, case, "anchored")
    ]
    counted = row["kernels"]["anchored_fwd_tma"]
    now = (found["epilogue"] / 128, found["reg"], found["stack"])
    then = (counted["instructions_per_cell"], counted["registers"], counted["spilled_bytes"])
    assert now == pytest.approx(then), "run: python benchmarks/predict.py"


def test_a_row_is_summed_in_the_same_order_whatever_is_kept(compiled):
    """Log-probabilities are the same bits with and without gradient only if layouts agree."""
    layouts = defaultdict(list)
    for x in compiled:
        name = x["name"]
        if name.startswith(("forward", "pointers", "descriptors")):
            name = name.replace("frozen=True ", "frozen=False ")
            layouts[x["sm"], name.split("kept=")[0]].append(x["reductions"])
    assert any(len(variants) > 2 for variants in layouts.values())
    for key, variants in layouts.items():
        assert variants[0], key
        assert all(variant == variants[0] for variant in variants), key

"""benchmarks/predict.py: its page is its JSON, and it counts what a hand counts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "predict.py").is_file(), reason="not a checkout"
)
N, H, V = 64, 16, 304
LAUNCHES = f"""
import json, predict
found = {{
    backend: predict.launches_of({N}, {H}, {V}, predict.CASES["keep"], backend)[1]
    for backend in predict.BACKENDS
}}
rows = {{name: [(x.name, x.bytes, x.flops) for x in each] for name, each in found.items()}}
print(json.dumps(rows))
"""
# Bytes: bfloat16 operands, float32 sums, int64 labels.
X, W, TILE, LABELS, NUMBERS = 2 * N * H, 2 * V * H, N * V, 8 * N, 4 * N
TO_HIDDEN = ("product", 2 * TILE + W + 2 * (4 * N * H))  # d hidden is read and written
TO_WEIGHT = ("product", 2 * TILE + X + W)
EXPECTED = {
    "triton": [
        ("product", X + W + 4 * TILE),
        ("rows_fwd", (4 + 2) * TILE + LABELS + (7 + 1) * NUMBERS),
        ("rows_bwd", (2 + 2) * TILE + LABELS + (5 + 1) * NUMBERS),
        TO_HIDDEN,
        TO_WEIGHT,
    ],
    "anchored": [
        ("anchored_target", 2 * X + LABELS + 3 * NUMBERS),
        # Sums of two blocks of words.
        ("anchored_fwd_tma", X + W + 2 * TILE + LABELS + NUMBERS + 2 * NUMBERS),
        ("anchored_fold", 2 * NUMBERS + LABELS + NUMBERS + 7 * NUMBERS + 2 * N),
        ("anchored_again", NUMBERS),
        ("anchored_again", NUMBERS),
        ("anchored_fold", NUMBERS),
        TO_HIDDEN,
        TO_WEIGHT,
    ],
}


# The same but for the product: two blocks of words, and columns in place of labels.
CUTLASS = X + W + 2 * TILE + 2 * NUMBERS + 2 * NUMBERS
for backend, name in (
    ("cutlass", "cutlass, one group multiplies"),
    ("cooperative", "cutlass, both groups multiply"),
):
    EXPECTED[backend] = [
        (name, CUTLASS) if launch[0] == "anchored_fwd_tma" else launch
        for launch in EXPECTED["anchored"]
    ]


@pytest.fixture(scope="module")
def launches() -> dict[str, list]:
    """In a process of its own, where the kernels are not interpreted and the GPU is pretended."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT / "benchmarks"), *(path for path in sys.path if path)]
    env["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("backend", EXPECTED)
def test_bytes_and_products_of_a_call(launches, backend):
    found = launches[backend]
    names = {name for name, _ in EXPECTED[backend]}
    assert [(name, moved) for name, moved, _ in found if name in names] == EXPECTED[backend]
    assert sum(flops for *_, flops in found) == 3 * 2 * N * H * V
    # What is left is numbers of rows, and d hidden scaled by one each.
    assert all(moved <= 2 * (4 * N * H) + NUMBERS for name, moved, _ in found if name not in names)


@pytest.mark.parametrize(("hidden", "longer"), [(2048, "products"), (64, "epilogue")])
def test_what_overlaps_in_a_product_on_cutlass(monkeypatch, hidden, longer):
    """By hand, of 3 rounds of blocks of 128 x 192 and of 2 of 128 x 256."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    predict = importlib.import_module("predict_cutlass")
    path, loop = ["MUFU.EX2 R0, R0"] * 192 + ["FADD"] * 808, ["HGMMA"] * 60
    nvcc = SimpleNamespace(
        epilogue=lambda _: path, main_loop=lambda _: loop, tensor_cycles=lambda _: 768.0
    )
    monkeypatch.setattr(predict, "tools", lambda: (None, None, nvcc))
    monkeypatch.setattr(predict, "_compiled", lambda _: ({False: "code"}, {}))
    steps, attained = hidden // 64, 0.91 * 0.95
    blocks = {"n": 128 * 132, "h": hidden, "sums": 1, "stored": False, "swizzle": 1}
    pingpong = predict.Fused(v=3 * 192, words=192, overlaps=True, **blocks)
    # 1,000 instructions every second clock and the other's main loop; exponentials take 1,536.
    products, epilogue = 768 * steps / attained, 2000 + 60 * steps
    assert (products > epilogue) == (longer == "products")
    expected = 3 * max(products, epilogue) + min(products, epilogue)
    assert pingpong.clocks == pytest.approx(expected)
    shared = predict.Fused(v=2 * 256, words=256, overlaps=False, **blocks)
    # Two warp groups multiply, and take exponentials of 8 warps at 16 a clock.
    assert shared.clocks == pytest.approx(2 * (2 * products + 32 * 8 * 192 / 16))
    assert (pingpong.file, shared.file) == ("anchored_pingpong", "anchored_cooperative")


def test_the_page_is_what_was_computed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    predict = importlib.import_module("predict")
    predicted = json.loads((ROOT / predict.RESULT).read_text(encoding="utf-8"))
    (written,) = predict.BLOCK.findall(predict.PAGE.read_text(encoding="utf-8"))
    assert written == predict.tables(predicted), "run: python benchmarks/predict.py"
    assert predicted["assumed"] == predict.ASSUMED

"""The choice between the forwards of a GPU: what a report says is what is taken."""

from __future__ import annotations

import json

import pytest
import torch

from fastpo import cli
from fastpo.bench.choose import choose, rows_of
from fastpo.bench.errors import BenchError
from fastpo.ops.rows import fastest, registry

CUDA = torch.device("cuda")


def report(hidden: int = 4096, status: str = "ok", **products: float) -> dict:
    """A score and a frozen head of two sizes; the frozen one of "cutlass" has `status`."""
    rows = [
        {
            "variant": f"fastpo {backend}{' keep' if case == 'trainable' else ''}",
            "own": True,
            "case": case,
            "status": status if (backend, case) == ("cutlass", "frozen") else "ok",
            "tokens": tokens,
            "vocab": 1000,
            "hidden": hidden,
            "products": value * factor,
        }
        for backend, value in products.items()
        for case, factor in (("score", 1), ("frozen", 2), ("trainable", 3))
        for tokens in (512, 1024)
    ]
    rows.append({**rows[0], "variant": "eager", "products": 0.1})
    size = {"tokens": 1024, "vocab": 1000, "hidden": hidden}
    floor = dict.fromkeys(("score", "frozen", "trainable"), 1.0)
    return {
        "what": "head",
        "created": "2026-01-01",
        "device_type": "cuda",
        "device": "A GPU",
        "capability": "9.0",
        "dtype": "bfloat16",
        "threads": 1,
        "load_average": None,
        "versions": dict.fromkeys(("torch", "trl", "liger_kernel")),
        "backend": "triton",
        "shapes": [size | {"floor_ms": floor}],
        "rows": rows,
    }


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "fastest.json"
    path.write_text('{"rows": []}')
    monkeypatch.setattr(fastest, "TABLE", path)
    forget()
    yield path
    forget()


def forget():
    fastest.table.cache_clear()
    fastest.fastest.cache_clear()


def write(path, *reports: dict):
    files = []
    for i, made in enumerate(reports):
        files.append(path.with_name(f"report{i}.json"))
        files[-1].write_text(json.dumps(made))
    forget()
    return files


@pytest.mark.parametrize(
    ("given", "backend"),
    [
        ({"triton": 1.3, "anchored": 1.1, "cutlass": 1.05}, "cutlass"),
        ({"triton": 1.3, "anchored": 1.1, "cutlass": 1.05, "status": "wrong"}, "anchored"),
        ({"triton": 1.1, "anchored": 1.1, "cuda": 1.1}, "triton"),
    ],
)
def test_the_least_products_win(given, backend, table):
    (row,) = choose(write(table, report(**given)), table)
    assert row["backend"] == backend
    assert row["products"]["triton"] == pytest.approx(2 * given["triton"])
    assert row["report"] == "report0.json"
    assert fastest.fastest("A GPU", "bfloat16", 4096) == backend
    assert fastest.fastest("A GPU", "float16", 4096) is None
    assert fastest.fastest("Another", "bfloat16", 4096) is None


def test_the_nearest_hidden_size_counts_and_new_reports_replace_old_ones(table):
    small, large = report(1000, triton=1.0, anchored=2.0), report(4000, triton=2.0, anchored=1.0)
    choose(write(table, small, large), table)
    found = [fastest.fastest("A GPU", "bfloat16", hidden) for hidden in (10, 1900, 2100, 9999)]
    assert found == ["triton", "triton", "anchored", "anchored"]
    choose(write(table, report(1000, triton=2.0, anchored=1.0)), table)
    assert len(json.loads(table.read_text())["rows"]) == 2
    assert fastest.fastest("A GPU", "bfloat16", 10) == "anchored"


def test_what_is_taken_on_a_gpu(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    missing: list[str] = []
    monkeypatch.setattr(
        registry, "unavailable", lambda name, device: name if name in missing else None
    )
    given = CUDA, torch.bfloat16, 4096
    assert fastest.choose(None, *given) == "triton"
    choose(write(table, report(triton=1.3, cutlass=1.1)), table)
    assert fastest.choose(None, *given) == "cutlass"
    assert fastest.choose("cuda", *given) == "cuda"
    assert fastest.choose(None, CUDA, torch.float32, 4096) == "triton"
    missing.append("cutlass")
    assert fastest.choose(None, *given) == "triton"


def test_the_command(table, capsys):
    (path,) = write(table, report(triton=1.3, anchored=1.25))
    assert cli.main(["bench", "choose", str(path)]) == 0
    said = capsys.readouterr().out
    assert "A GPU, bfloat16, H 4096: anchored (triton 2.60, anchored 2.50)" in said
    (wrong,) = write(table, report(triton=1.0) | {"device_type": "cpu"})
    assert cli.main(["bench", "choose", str(wrong)]) == 2
    assert "expected a report of `fastpo bench head` on a GPU" in capsys.readouterr().err


def test_a_report_without_triton_decides_nothing(tmp_path):
    assert rows_of(report(anchored=1.0), tmp_path) == []
    with pytest.raises(BenchError, match="expected a report of `fastpo bench head`"):
        rows_of({"what": "step", "device_type": "cuda"}, tmp_path)


def test_the_shipped_table_holds_measurements_only():
    for row in json.loads(fastest.TABLE.read_text())["rows"]:
        reports = fastest.TABLE.parents[3] / "benchmarks" / "results"
        assert not reports.is_dir() or (reports / row["report"]).is_file()

"""Reports of benchmarks: tables and plots of them, and what is no report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpo import cli
from fastpo.bench import readme, report
from fastpo.bench.errors import BenchError
from fastpo.bench.shapes import Shape

ROOT = Path(__file__).parents[2]
SHAPE = Shape(16, 100, 8)
VERSIONS = {"torch": "2.13", "trl": None, "liger_kernel": None}


HEAD = {
    "what": "head",
    "device": "A Device",
    "device_type": "cpu",
    "created": "2026-01-02T03:04:05+00:00",
    "threads": 2,
    "capability": "AVX2",
    "load_average": [0.1, 0.1, 0.1],
    "dtype": "float32",
    "backend": "cpu",
    "versions": {"torch": "9.9", "trl": None, "liger_kernel": None},
    "shapes": [{**SHAPE._asdict(), "floor_ms": {"score": 2.0, "frozen": 4.0, "trainable": 6.0}}],
    "rows": [
        {
            **SHAPE._asdict(),
            **dict(zip(("variant", "own", "case", "status"), names, strict=True)),
            "errors": {"logps": 1e-6},
            **({"median_ms": ms, "runs_ms": [ms], "products": ms / 2} if ms else {"reason": "no"}),
        }
        for *names, ms in (
            ("fastpo cpu", True, "score", "ok", 2.2),
            ("fastpo torch", True, "score", "ok", 3.3),
            ("fastpo cpu keep", True, "trainable", "ok", 6.6),
            ("eager", False, "score", "ok", 2.1),
            ("cce", False, "score", "refused", None),
        )
    ],
}


def test_readme_takes_its_tables_from_reports(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(HEAD))
    text = "before\n<!-- bench: r.json -->\nfastest in the world\n<!-- end of bench -->\nafter\n"
    page = tmp_path / "README.md"
    page.write_text(text)
    assert cli.main(["bench", "readme", str(page), "--check"]) == 1
    assert page.read_text() == text
    assert ": differs from r.json\n" in capsys.readouterr().out
    assert cli.main(["bench", "readme", str(page)]) == 0
    new = page.read_text()
    assert new.startswith("before\n<!-- bench: r.json -->\nHead of N 16, V 100, H 8, float32, ")
    assert "fastest" not in new
    assert "| fastpo, probabilities kept | 3.30 | – | 1.0e-06 |" in new
    assert new.index("| eager | 1.05") < new.index("| fastpo | 1.10")
    assert "1.65" not in new  # a backend fastpo does not choose here
    assert cli.main(["bench", "readme", str(page), "--check"]) == 0


def test_readme_shows_no_times_of_a_busy_cpu():
    text = readme.render(HEAD | {"load_average": [4.6, 4.0, 3.0]}, "r.json")
    assert "no times, because other work ran beside it (load 4.6)" in text
    assert "products |" not in text
    assert "| fastpo | – | 1.0e-06 |" in text


def test_readme_without_a_table_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("nothing\n")
    with pytest.raises(BenchError, match="expected a line <!-- bench: FILE -->, got none"):
        readme.rewrite(page, write=False)


def test_what_fits_is_in_a_table_for_each_model():
    rows = [
        ("a", "bare", "trl", 0, 3),
        ("a", "bare", "fastpo", 4096, 8),
        ("b", "bare", "trl", 1, 1),
    ]
    rows += [("a", "more", "fastpo", 8192, 9)]
    names = ("model", "way", "head", "context", "batch")
    model = {"card": "h100", "memory": 79 * 2**30, "weights": 2**30, "lora": True}
    report = {k: v for k, v in HEAD.items() if k != "shapes"} | {
        "what": "plan contexts",
        "batch_context": 2048,
        "models": [model | {"name": name} for name in "ab"],
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
    }
    text = readme.render(report, "r.json")
    assert "`a` (1.0 GiB of weights), LoRA, on a H100 (79.0 GiB)" in text
    assert "| bare | none | 4,096 | 3 | 8 |\n| + more | – | 8,192 | – | 9 |" in text
    assert text.count("| context, TRL |") == 2


def test_a_framework_has_a_row_for_each_case():
    def took(mib):
        return {"mib": mib, "step_s": mib / 100, "load_average": [1.0, 2.0, 3.0]}

    cases = {"DPO": ["numpy (loss.py:7) is computed on full logits"], "KTO": []}
    report = {k: v for k, v in HEAD.items() if k != "shapes"} | {
        "what": "frameworks",
        "framework": "ms-swift",
        "version": "4.6.0",
        **dict(zip("VTH", (5000, 256, 64), strict=True)),
        "steps": 3,
        "rows": [
            {"case": name, "plain": took(2000), "fastpo": took(700), "full_logits": said}
            for name, said in cases.items()
        ],
    }
    text = readme.render(report, "r.json")
    assert text.startswith("ms-swift 4.6.0, V 5,000, T 256, H 64, ")
    row = "2,000 MiB | 700 MiB | 20.0 s | 7.0 s | 1.0 and 1.0 |"
    assert f"| DPO | {row} numpy (loss.py:7) is computed on full logits |" in text
    assert f"| KTO | {row} – |" in text


def test_an_error_that_is_not_finite_is_in_the_table():
    rows = [row | {"errors": {"logps": None}} for row in HEAD["rows"]]
    assert "| eager | 1.05 | – | not finite |" in readme.render(HEAD | {"rows": rows}, "r.json")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            [],
            "what: expected head, step, shared, soak, sweep, primitives, trainers, frameworks, "
            "real model, plan errors, lazy logits, supports, sampler, plan contexts",
        ),
        (HEAD | {"rows": {}}, "rows: expected a list, got an object"),
        (HEAD | {"rows": [None]}, "rows[0]: expected an object, got null"),
        (HEAD | {"rows": [{"tokens": 0}]}, "rows[0].tokens: expected an integer of 1 to 1e15, got"),
        (HEAD | {"device": "a\nb"}, 'device: expected a line of text, got "a\\nb"'),
        (
            HEAD | {"versions": {"trl": None}},
            "versions.torch: expected a line of text or null, got n",
        ),
        (
            HEAD | {"load_average": [1, 2]},
            "load_average: expected three numbers or null, got a list",
        ),
        (HEAD | {"threads": True}, "threads: expected an integer of 1 to 1e15, got true"),
        (HEAD | {"rows": []}, "expected a report with times, got one without"),
        (HEAD | {"what": "step"}, "model: expected an object, got nothing"),
    ],
)
def test_what_a_report_lacks_is_said_in_one_line(made, message, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(made))
    assert cli.main(["bench", "plot", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"fastpo bench plot: error: {path}: {message}")


def test_trainers_are_compared_in_pairs():
    row = {"trainer": "DPO", "patched": True, "mib": 1, "step_s": 1, "load_average": [0, 0, 0]}
    lone = HEAD | {"what": "trainers", "V": 1, "T": 1, "H": 1, "rows": [row]}
    with pytest.raises(
        BenchError, match=r"r\.json: rows: expected DPO with and without the patch, got one"
    ):
        readme.render(lone, "r.json")


def test_a_reading_that_was_interrupted_has_no_row():
    path = Path(__file__).parents[2] / "benchmarks/results/cpu_amd_epyc_lazy_logits.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    text = readme.render(report | {"rows": report["rows"][:3]}, "r.json")
    first, second = (report["rows"][i]["reading"] for i in (0, 2))
    assert f"| {first} |" in text and f"| {second} |" not in text


def test_files_that_cannot_be_read_or_written(tmp_path, capsys):
    page, report = tmp_path / "README.md", tmp_path / "r.json"
    page.write_bytes(b"\xff")
    assert cli.main(["bench", "readme", str(page)]) == 2
    assert f"{page}: expected UTF-8 text, got byte 0" in capsys.readouterr().err
    report.write_text(json.dumps(HEAD))
    assert cli.main(["bench", "plot", str(report), "--out", str(page)]) == 2
    assert f"error: {page}: File exists\n" in capsys.readouterr().err


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    other = {**HEAD["shapes"][0], "tokens": 32}
    dollars = HEAD | {"device": "a $\\frac$ of a device"}  # else a formula, and a wrong one
    walk = HEAD | {"rows": HEAD["rows"] + [row | {"tokens": 32} for row in HEAD["rows"]]}
    walk["shapes"] = [*HEAD["shapes"], other]
    for name, made in {"bars": dollars, "walk": walk}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
        assert cli.main(["bench", "plot", str(tmp_path / f"{name}.json")]) == 0
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_has_no_infinities(tmp_path):
    report.write({"what": "head", "rows": [{"error": float("inf")}]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [{"error": None}]


def test_an_interrupted_report_is_the_last_whole_one(tmp_path, monkeypatch):
    report.write({"what": "head", "rows": [1]}, tmp_path / "x.json")

    def interrupted(path, text, **_):
        path.open("w").write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write({"what": "head", "rows": [1, 2]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [1]


def made(what, **rows):
    return {"what": what, "device": "CPU", "capability": "AVX2", "versions": VERSIONS, **rows}


def test_a_support_has_a_row_for_each_number_of_words():
    row = {"words": 1024, "trained": True, "few_s": 0.25, "many_s": 4.0, "plain_s": 3.0}
    shape = {"tokens": 2048, "vocab": 151936, "hidden": 896, "dtype": "float32"}
    given = {"shape": shape, "threads": 1, "created": "2026-11-28T00:00:00", "rows": [row]}
    table = readme.render(made("supports", **given), "x.json")
    assert "2,048 tokens, V 151,936, H 896, float32" in table
    assert "| 1,024 | trained | 0.25 s | 4 s | 3 s |" in table


def test_a_sampler_has_a_row_for_each_way_to_score_it():
    row = {"over": "all words", "tokens": 4000, "mean": 0.9, "outside": 0.5}
    row |= {"q01": -0.4, "q99": 0.0, "largest": 0.6}
    given = {"model": "m", "sampling": "top_p = 0.8", "created": "2026-11-28", "rows": [row]}
    table = readme.render(made("sampler", **given), "x.json")
    assert "m, 4,000 tokens sampled by transformers with top_p = 0.8" in table
    assert "| all words | 0.9000 | 50.0% | -4.0e-01 | +0.0e+00 | 6.0e-01 |" in table

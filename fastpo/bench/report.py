"""Reports of benchmarks: files, and tables for the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import BenchError
from .schema import check
from .shapes import Shape

Report = dict[str, Any]


def write(report: Report, path: Path) -> None:
    """In one piece: an interrupt leaves the last one that was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False)
    piece = path.with_name(f".{path.name}")
    piece.write_text(text + "\n", encoding="utf-8")
    piece.replace(path)


def finite(value: Any) -> Any:
    """JSON has no infinite numbers; an error that is one becomes null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Report:
    """BenchError unless the file is a report of `fastpo bench`."""
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or a number or depth out of bounds
        raise BenchError(f"{path}: expected a report of fastpo bench, got no JSON") from None
    check(report, path)
    return report


def grow(
    report: Report,
    path: Path,
    cases: Iterable[tuple[str, str, str]],  # model, way, head
    row: Callable[[str, str, str], Report],
    runs: int | None,
) -> None:
    """Rows that the file has, and those of the cases it lacks, written one by one; no more than
    `runs` of them."""
    if path.exists():
        report["rows"] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    known = {(made["model"], made["way"], made["head"]) for made in report["rows"]}
    for case in [case for case in cases if case not in known][:runs]:
        report["rows"].append(row(*case))
        write(report, path)


def progress(text: str) -> None:
    """What is being measured, in the terminal's last line; nothing where there is no terminal."""
    if sys.stderr.isatty():
        print(f"\r{text[:78]:<78}\r", end="", file=sys.stderr, flush=True)


def where(report: Report) -> str:
    """The machine in a line."""
    parts = [report["device"]]
    if report["device_type"] == "cpu":
        parts.append(f"{report['threads']} threads, {report['capability']}")
    parts.append(f"torch {report['versions']['torch']}")
    return ", ".join(parts)


def head_table(report: Report, shape: Shape, rows: list[dict[str, Any]]) -> str:
    floor = next((s["floor_ms"] for s in report["shapes"] if _is(s, shape)), None)
    lines = ["", f"{where(report)}, {report['dtype']}, {shape}"]
    if floor is not None:
        lines.append("bare products: " + ", ".join(f"{c} {ms:.2f} ms" for c, ms in floor.items()))
    lines.append(
        f"{'case':<10} {'variant':<32}{'median ms':>11}{'spread':>19}{'products':>10}"
        f"{'of floor':>10}{'extra MiB':>11}{'error':>10}"
    )
    there = [_head_line(row) for row in rows if row["status"] == "ok"]
    return "\n".join([*lines, *there, *_absent(rows)])


def _absent(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each reason, not for each case."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["variant"], f"{row['status']}: {row['reason']}")
            reasons.setdefault(key, []).append(row["case"])
    return [f"{name} ({', '.join(cases)}) {why}" for (name, why), cases in reasons.items()]


def _is(found: dict[str, Any], shape: Shape) -> bool:
    return all(found[name] == value for name, value in shape._asdict().items())


def _head_line(row: dict[str, Any]) -> str:
    start = f"{row['case']:<10} {row['variant']:<32}"
    error = row["errors"]["logps"]
    if "median_ms" not in row:
        return f"{start}{'checked':>11}{error:>60.1e}"
    spread = f"{row['min_ms']:.2f}–{row['max_ms']:.2f}" if len(row["runs_ms"]) > 1 else "one run"
    extra = f"{max(row['extra_mib'], 0):.0f}" if "extra_mib" in row else "–"
    return (
        f"{start}{row['median_ms']:>11.2f}{spread:>19}{row['products']:>10.2f}"
        f"{row['fraction_of_floor']:>10.0%}{extra:>11}{error:>10.1e}"
    )


def step_table(report: Report) -> str:
    wide = max(map(len, ("variant", *(row["variant"] for row in report["rows"])))) + 2
    head = (
        f"{'variant':<{wide}}{'pairs':>6}{'length':>8}{'step s':>10}{'tokens/s':>11}"
        f"{'extra MiB':>11}{'total MiB':>11}{'loss':>10}"
    )
    lines = ["", f"{where(report)}, {report['model']['name']}, {report['dtype']}", head]
    texts = None
    for row in report["rows"]:
        if report["what"] == "shared" and row["texts"] != texts:
            texts = row["texts"]
            lines.append(f"{texts}: {token_counts(row)} tokens")
        start = f"{row['variant']:<{wide}}{row['pairs']:>6}{row['length']:>8}"
        if row["status"] != "ok":
            lines.append(f"{start} {row['status']}: {row['reason']}")
            continue
        lines.append(
            f"{start}{row['median_s']:>10.3f}{row['tokens_per_s']:>11.0f}"
            f"{row['extra_mib']:>11.0f}{row['total_mib']:>11.0f}{row['loss']:>10.4f}"
        )
    for fit in report["fits"]:
        what = {"length": "longest context", "pairs": "biggest batch"}[fit["of"]]
        bound = " or more" if fit["at_limit"] else ""
        other = "length" if fit["of"] == "pairs" else "pairs"
        lines.append(
            f"{fit['variant']:<{wide}}{what} under {fit['limit_mib']:,} MiB at {other} "
            f"{fit[other]}: {fit['largest']:,}{bound}"
        )
    return "\n".join(lines)


def token_counts(row: dict[str, Any]) -> str:
    """Of the padded batch, without its pads, and with every distinct one once."""
    return " → ".join(f"{n:,}" for n in dict.fromkeys(row["tokens"]))


def sweep_table(report: Report) -> str:
    lines = ["", f"{where(report)}, tile {report['n']} x {report['width']}"]
    for row in report["rows"]:
        start = f"{row['kernel']:<22}{row['variant']:<18}"
        if row["status"] != "ok":
            lines.append(f"{start}{row['status']}: {row['reason']}")
            continue
        lines.append(f"{start}{row['median_ms']:>10.3f} ms{row['gb_per_s']:>10.0f} GB/s")
    return "\n".join(lines)

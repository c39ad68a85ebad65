"""Tables of README.md and docs, from reports: a figure that is in no report cannot stay there.

<!-- bench: benchmarks/results/NAME.json -->
... replaced ...
<!-- end of bench -->
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BenchError
from .report import Report, read, token_counts
from .shapes import Shape
from .tables import architectures, sampling, soak

_BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n)(.*?)(<!-- end of bench -->)", re.DOTALL)
_MOST_LOAD = 1.5
_HEAD_NAMES = {
    "score": "no gradient",
    "frozen": "frozen head",
    "trainable": "trained head",
    "keep": "probabilities kept",
    "lean": "nothing kept",
    "statistics": "with TRL's statistics",
}


def rewrite(path: Path, *, write: bool) -> list[str]:
    """Names of the reports whose tables were others; `write` puts them right."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: expected UTF-8 text, got byte {error.start}") from None
    stale = []

    def table(found: re.Match[str]) -> str:
        start, name, before, end = found.groups()
        body = render(read(path.parent / name), name)
        if body != before:
            stale.append(name)
        return start + body + end

    new = _BLOCK.sub(table, text)
    if not _BLOCK.search(text):
        raise BenchError(f"{path}: expected a line <!-- bench: FILE -->, got none")
    if write and stale:
        path.write_text(new, encoding="utf-8")
    return stale


def render(report: Report, name: str) -> str:
    parts = {
        "head": _head,
        "step": _step,
        "shared": _shared,
        "primitives": _primitives,
        "trainers": _trainers,
        "frameworks": _frameworks,
        "real model": _real_model,
        "plan errors": _plan_errors,
        "plan contexts": _plan_contexts,
        "lazy logits": _lazy_logits,
        "supports": sampling.supports,
        "sampler": sampling.sampler,
        "soak": soak.soak,
        "architectures": architectures.architectures,
    }
    if report["what"] not in parts:
        raise BenchError(f"{name}: expected a report of {', '.join(parts)}, got {report['what']}")
    try:
        lines = "\n".join(parts[report["what"]](report))
    except BenchError as error:
        raise BenchError(f"{name}: {error}") from None
    return f"{lines}\n\n{_source(report, name)}\n"


def _source(report: Report, name: str) -> str:
    versions = report["versions"]
    used = ", ".join(f"{k} {versions[k]}" for k in ("torch", "trl", "liger_kernel") if versions[k])
    busy = ""
    if report["what"] in ("head", "step", "shared") and _busy(report):
        busy = (
            f"; no times, because other work ran beside it (load {report['load_average'][0]:.1f})"
        )
    return f"`{name}`, {report['created'][:10]}, {used}{busy}."


def _busy(report: Report) -> bool:
    """A time on a shared CPU says nothing: the same variant took 3 s and 17 s in one run."""
    load = report["load_average"]
    shared = report["device_type"] == "cpu" and report.get("clock") != "process"
    return shared and load is not None and load[0] > _MOST_LOAD


def _machine(report: Report) -> str:
    if report["device_type"] == "cuda":
        return f"on one {report['device']}"
    cores = "one core" if report["threads"] == 1 else f"{report['threads']} cores"
    return f"on {cores} of an {report['device']} ({report['capability']})"


def _head(report: Report) -> Iterator[str]:
    timed = not _busy(report)
    for shape in report["shapes"]:
        size = Shape(*(shape[name] for name in Shape._fields))
        floor = shape["floor_ms"]
        unit = f", in units of one bare matrix product ({_milliseconds(floor['score'])})"
        yield f"Head of {size}, {report['dtype']}, {_machine(report)}{unit * timed}:"
        yield ""
        yield f"| |{' products |' * timed} extra memory | log-prob error |"
        yield "| --- |" + " --- |" * (3 if timed else 2)
        rows = [r for r in report["rows"] if all(r[k] == v for k, v in size._asdict().items())]
        for case in ("score", "frozen", "trainable"):
            best = f" bare products | {floor[case] / floor['score']:.2f} |" if timed else " |"
            if not (shown := _shown(rows, case, report["backend"])):
                continue
            yield f"| **{_HEAD_NAMES[case]}**{best} | |"
            for row in sorted(shown, key=lambda row: row["median_ms"]) if timed else shown:
                yield _head_row(row, timed)


def _shown(rows: list[dict[str, Any]], case: str, backend: str) -> list[dict[str, Any]]:
    """What was timed; of fastpo's backends the one it chooses."""
    timed = [row for row in rows if row["case"] == case and "median_ms" in row]
    return [row for row in timed if not row["own"] or row["variant"].split()[1:2] == [backend]]


def _head_row(row: dict[str, Any], timed: bool) -> str:
    name = row["variant"]
    if row["own"]:
        mode = name.split()[2:]
        name = ", ".join(["fastpo", *(_HEAD_NAMES.get(m, m) for m in mode)])
    extra = f"{max(row['extra_mib'], 0):,.0f} MiB" if "extra_mib" in row else "–"
    error = row["errors"]["logps"]
    shown = "not finite" if error is None else f"{error:.1e}"
    products = f" {row['products']:.2f} |" if timed else ""
    return f"| {name} |{products} {extra} | {shown} |"


def _milliseconds(value: float) -> str:
    return f"{value / 1e3:.1f} s" if value >= 1e3 else f"{value:.2f} ms"


def _step(report: Report) -> Iterator[str]:
    model = report["model"]
    size = model["parameters"] / 1e6
    yield (
        f"A DPO step of `{model['name']}` ({size:,.0f} M parameters), {report['dtype']}, "
        f"{_machine(report)}:"
    )
    yield ""
    timed = not _busy(report)
    yield f"| | pairs × tokens |{' step | tokens/s |' * timed} memory of the step |"
    yield "| --- | --- |" + " --- |" * (3 if timed else 1)
    for row in report["rows"]:
        if row.get("status") == "ok":
            times = f" {row['median_s']:.2f} s | {row['tokens_per_s']:,.0f} |" if timed else ""
            size = f"{row['pairs']} × {row['length']:,}"
            yield f"| {row['variant']} | {size} |{times} {row['extra_mib']:,.0f} MiB |"
    yield from _fits(report)


def _fits(report: Report) -> Iterator[str]:
    if any(fit["largest"] for fit in report["fits"]):
        yield ""
    for of, what in {"length": "Longest context", "pairs": "Biggest batch"}.items():
        fits = [fit for fit in report["fits"] if fit["of"] == of]
        if any(fit["largest"] for fit in fits):  # else the models alone are larger than the limit
            found = ", ".join(f"{f['variant']} {f['largest']:,}{_more(f)}" for f in fits)
            other = "pairs" if of == "length" else "length"
            at = f" at {fits[0]['texts']}, {other} {fits[0][other]}," if "texts" in fits[0] else ""
            yield f"{what}{at} under {fits[0]['limit_mib']:,} MiB: {found}."


def _more(fit: dict[str, Any]) -> str:
    unit = " tokens" if fit["of"] == "length" else " pairs"
    return unit + (" or more" if fit["at_limit"] else "")


def _shared(report: Report) -> Iterator[str]:
    """A row for each kind of batch, a column for each variant: against fastpo that shares none."""
    model, timed = report["model"], not _busy(report)
    size = model["parameters"] / 1e6
    how = " Layers are recomputed in the backward." if report["checkpointing"] else ""
    clock = ", CPU time" if report["clock"] == "process" else ""
    yield (
        f"A DPO step of `{model['name']}` ({size:,.0f} M parameters), {report['dtype']}, "
        f"{_machine(report)}{clock}, and its memory.{how}"
    )
    yield ""
    names = list(dict.fromkeys(row["variant"] for row in report["rows"]))
    yield f"| prompt : completion | tokens | {' | '.join(names)} |"
    yield "| --- | --- |" + " --- |" * len(names)
    cases: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        case = cases.setdefault((row["texts"], row["pairs"], row["length"]), {})
        case[row["variant"]] = row
    for (texts, pairs, length), rows in cases.items():
        cells = " | ".join(_shared_cell(rows, name, timed) for name in names)
        tokens = token_counts(next(iter(rows.values())))
        yield f"| {texts}, {pairs} × {length:,} | {tokens} | {cells} |"
    yield from _fits(report)


def _shared_cell(rows: dict[str, dict[str, Any]], name: str, timed: bool) -> str:
    row = rows.get(name, {})
    if row.get("status") != "ok":
        return "–"
    memory = f"{row['extra_mib']:,.0f} MiB"
    if not timed:
        return memory
    padded = rows.get(name[: name.find("fastpo") + len("fastpo")], {})
    faster = ""
    if "fastpo +" in name and "median_s" in padded:
        faster = f" ({padded['median_s'] / row['median_s']:.2f}×)"
    return f"{row['median_s']:.2f} s{faster}, {memory}"


_PRIMITIVES = {
    "linear_logps": "log-probabilities",
    "linear_topk": "{k} best words",
    "mixed_linear_logps": "mixture of two heads",
    "forward_kl": "forward KL of two heads",
    "jsd": "JSD of two heads",
}


def _primitives(report: Report) -> Iterator[str]:
    """Memory only: nothing here depends on what else runs."""
    found = {(r["primitive"], r["form"], r["mode"]): r["extra_mib"] for r in report["rows"]}
    size = f"N {report['N']:,}, V {report['V']:,}, H {report['H']:,}, {report['dtype']}"
    logits = f"{report['logits_mib']:,.0f} MiB"
    yield f"Memory above inputs and gradients, {size}, of which float32 logits are {logits}:"
    yield ""
    columns = {
        ("fused", "score"): "fastpo, no gradient",
        ("fused", "trainable"): "fastpo, trained",
        ("fused", "lean"): "fastpo, nothing kept",
        ("materialised", "score"): "logits, no gradient",
        ("materialised", "trainable"): "logits, trained",
    }
    yield f"| | {' | '.join(columns.values())} |"
    yield "| --- |" + " --- |" * len(columns)
    for primitive, name in _PRIMITIVES.items():
        cells = [found.get((primitive, *column)) for column in columns]
        shown = "".join(" |" if x is None else f" {x:,.0f} MiB |" for x in cells)
        yield f"| {name.format(**report)} |{shown}"


def _trainers(report: Report) -> Iterator[str]:
    many = "s" * (report["threads"] > 1)
    yield (
        f"V {report['V']:,}, T {report['T']:,}, H {report['H']}, {report['dtype']}, "
        f"{report['threads']} thread{many} of an {report['device']} ({report['capability']}):"
    )
    yield ""
    yield "| trainer | memory, TRL | memory, fastpo | step, TRL | step, fastpo | load |"
    yield "| --- |" + " --- |" * 5
    cells = {(row["trainer"], row["patched"]): row for row in report["rows"]}
    for name in dict.fromkeys(row["trainer"] for row in report["rows"]):
        if not {(name, False), (name, True)} <= set(cells):
            raise BenchError(f"rows: expected {name} with and without the patch, got one of them")
        own, ours = cells[name, False], cells[name, True]
        memory = f"{own['mib']:,.0f} MiB | {ours['mib']:,.0f} MiB"
        load = " and ".join(f"{row['load_average'][0]:.1f}" for row in (own, ours))
        yield f"| {name} | {memory} | {own['step_s']:.1f} s | {ours['step_s']:.1f} s | {load} |"


def _frameworks(report: Report) -> Iterator[str]:
    yield (
        f"{report['framework']} {report['version']}, V {report['V']:,}, T {report['T']:,}, "
        f"H {report['H']}, {report['dtype']}, {report['threads']} thread of an {report['device']} "
        f"({report['capability']}), steps 1 to {report['steps']}:"
    )
    yield ""
    yield "| | memory | with fastpo | step | with fastpo | load | full logits in |"
    yield "| --- |" + " --- |" * 6
    for row in report["rows"]:
        own, ours = row["plain"], row["fastpo"]
        load = " and ".join(f"{run['load_average'][0]:.1f}" for run in (own, ours))
        yield (
            f"| {row['case']} | {own['mib']:,.0f} MiB | {ours['mib']:,.0f} MiB | "
            f"{own['step_s']:.1f} s | {ours['step_s']:.1f} s | {load} | "
            f"{'; '.join(row['full_logits']) or '–'} |"
        )


def _lazy_logits(report: Report) -> Iterator[str]:
    """A row for each reading; memory and time with the model's own logits, and with lazy ones."""
    shape = report["shape"]
    yield (
        f"{shape['tokens']:,} tokens, V {shape['vocab']:,}, H {shape['hidden']}, "
        f"{shape['dtype']}, forward and backward of the head {_machine(report)}, "
        "memory beside its weight, hidden states and their gradients, CPU time:"
    )
    yield ""
    yield "| read of the logits | memory | lazy | time | lazy |"
    yield "| --- |" + " --- |" * 4
    rows = {(row["reading"], row["logits"]): row for row in report["rows"]}
    for reading in dict.fromkeys(row["reading"] for row in report["rows"]):
        own, lazy = (rows.get((reading, how)) for how in ("own", "lazy"))
        if own is None or lazy is None:  # of a run that was interrupted
            continue
        memory = " | ".join(f"{row['extra_mib']:,.0f} MiB" for row in (own, lazy))
        times = " | ".join(f"{row['cpu_s']:.1f} s" for row in (own, lazy))
        yield f"| {reading} | {memory} | {times} |"


def _real_model(report: Report) -> Iterator[str]:
    """Errors of log-probabilities, and how far losses go from TRL's in float32."""
    first = report["errors"][0]
    yield (
        f"{report['model']}, {first['tokens']:,} scored tokens, nats: log-probabilities against "
        "float64 of the same hidden states, and losses of 50 DPO steps against TRL's in float32:"
    )
    yield ""
    yield "| | largest error | mean error | largest drift | mean drift |"
    yield "| --- |" + " --- |" * 4
    drift = {(row["dtype"], row["head"]): row for row in report["drift_from_float32"]}
    for row in report["errors"]:
        cells = [f"{row[name]:.1e}" for name in ("max", "mean")]
        other = drift.get((row["dtype"], row["head"]))
        cells += ["", ""] if other is None else [f"{other[x]:.1e}" for x in ("largest", "mean")]
        yield f"| {row['head']}, {row['dtype']} | {' | '.join(cells)} |"
    if report["steps"]:
        yield from _real_steps(report)


def _real_steps(report: Report) -> Iterator[str]:
    first = report["steps"][0]
    yield ""
    yield (
        f"A DPO step of it, {first['pairs']} pairs × {first['length']} tokens of "
        f"`{first['data']}`, float32, {_machine(report | {'threads': first['threads']})}:"
    )
    yield ""
    yield "| | CPU time | time on a shared machine | memory of the step |"
    yield "| --- |" + " --- |" * 3
    for row in report["steps"]:
        times = (f"{statistics.median(row[clock]):.1f} s" for clock in ("cpu_s", "wall_s"))
        name = "trl + fastpo" if row["head"] == "fastpo" else row["head"]
        yield f"| {name} | {' | '.join(times)} | {row['extra_mib']:,.0f} MiB |"


def _plan_errors(report: Report) -> Iterator[str]:
    """A row for each model: the prediction, and how far it is from the measured memory."""
    cells = {
        (row["model"], f"{row['way']}, {row['head']}"): (
            f"{row['told'] / 2**20:,.0f} ({row['told'] / row['held'] - 1:+.0%})"
        )
        for row in report["rows"]
    }
    models, columns = (dict.fromkeys(key[i] for key in cells) for i in range(2))
    yield f"| model | {' | '.join(columns)} |"
    yield "| --- |" + " --- |" * len(columns)
    for model in models:
        yield f"| {model} | {' | '.join(cells.get((model, x), '–') for x in columns)} |"
    yield ""
    errors = [abs(row["told"] / row["held"] - 1) for row in report["rows"]]
    yield (
        f"MiB predicted, and the difference from the measured memory, {_machine(report)}: "
        f"{len(errors)} cases, {sum(errors) / len(errors):.1%} off on average, at most "
        f"{max(errors):.1%}."
    )


def _plan_contexts(report: Report) -> Iterator[str]:
    """A table for each model; every row has what those above it have."""
    length = report["batch_context"]
    heads = {"trl": "TRL", "fastpo": "TRL + fastpo"}
    for i, model in enumerate(report["models"]):
        yield from [""] * (i > 0)
        yield (
            f"`{model['name']}` ({model['weights'] / 2**30:.1f} GiB of weights), "
            f"{'LoRA' if model['lora'] else 'trained whole'}, on a {model['card'].upper()} "
            f"({model['memory'] / 2**30:.1f} GiB): the longest context of one pair, and the most "
            f"pairs of {length:,} tokens."
        )
        yield ""
        names = [f"{what}, {name}" for what in ("context", "pairs") for name in heads.values()]
        yield f"| | {' | '.join(names)} |"
        yield "| --- |" + " --- |" * len(names)
        rows = [row for row in report["rows"] if row["model"] == model["name"]]
        found = {(row["way"], row["head"], x): row[x] for row in rows for x in ("context", "batch")}
        for n, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
            keys = itertools.product(("context", "batch"), heads)
            cells = (found.get((way, head, what)) for what, head in keys)
            shown = " | ".join("–" if x is None else f"{x:,}" if x else "none" for x in cells)
            yield f"| {'+ ' * (n > 0)}{way} | {shown} |"

"""What supports cost, and what they do to the ratio between trainer and sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Report = dict[str, Any]


def supports(report: Report) -> Iterator[str]:
    """A row for each number of words; one by one, in masked tiles, and the plain call."""
    shape = report["shape"]
    yield (
        f"{shape['tokens']:,} tokens, V {shape['vocab']:,}, H {shape['hidden']}, {shape['dtype']}, "
        f"forward and backward on one core of an {report['device']} ({report['capability']}), "
        "CPU time:"
    )
    yield ""
    yield "| words of a token | head | one by one | in tiles | all words |"
    yield "| --- | --- |" + " --- |" * 3
    for row in report["rows"]:
        cells = " | ".join(f"{row[way]:.3g} s" for way in ("few_s", "many_s", "plain_s"))
        head = "trained" if row["trained"] else "frozen"
        yield f"| {row['words']:,} | {head} | {cells} |"


def sampler(report: Report) -> Iterator[str]:
    """A row for each way to score what a sampler drew."""
    yield (
        f"{report['model']}, {report['rows'][0]['tokens']:,} tokens sampled by transformers with "
        f"{report['sampling']}, float32, at the same weights:"
    )
    yield ""
    yield "| scored over | mean ratio | outside [0.9, 1.1] | 1 % | 99 % | largest |"
    yield "| --- |" + " --- |" * 5
    for row in report["rows"]:
        logs = " | ".join(f"{row[name]:+.1e}" for name in ("q01", "q99"))
        yield (
            f"| {row['over']} | {row['mean']:.4f} | {row['outside']:.1%} | {logs} | "
            f"{row['largest']:.1e} |"
        )

"""The pages of the objectives: a table of all of them, and for each family a page of entries.

`python docs/_ext/objective_pages.py` writes docs/objectives.md and docs/objectives/.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from notation import rendered
from quantity_meanings import MEANINGS, sides

from fastpo.objectives import _describe
from fastpo.objectives._quantities import DIFFERENTIABLE, SHAPES
from fastpo.objectives._registry import Entry, families, lookup, quantities_of

DOCS = Path(__file__).parents[1]
PACKAGE = "fastpo.objectives"
TITLES = {
    "transforms": "Transforms",
    "pairs": "Pairs",
    "tokens": "Pairs, token level",
    "groups": "Groups",
    "singles": "Single responses",
    "policy_gradient": "Policy gradient",
    "distillation": "Distillation",
    "rewards": "Reward models",
    "denoising": "Denoising",
}
_NOTE = "<!-- Written by `python docs/_ext/objective_pages.py` from the docstrings. -->"
_INTRO = """\
`fastpo.objectives.get(key, **hyperparameters)` returns the function; `fastpo objectives KEY` prints
an entry in a terminal. Pairs, single responses, policy gradient and groups [train by
name](training.md) in TRL's trainers and `fastpo.GroupTrainer`; distillation, reward models and
denoising are plain functions for your own loop. Transforms are applied before an objective, by
`fastpo.objectives.compose`.

Each objective is a plain function of named [quantities](#quantities). It takes them by keyword (`?`
marks those that may be absent) and returns losses unreduced, one for each pair, row, group or
position; you take the mean. Gradient flows into the quantities marked `∂`; the others are
constants. Shapes: `B` pairs, `N` rows, `G` groups, `T` positions, `K` models or words, `P`
positions of `V` words, `M` and `U` rows of other kinds, `C`, `D`, `E` widths.

## Letters

$\\sigma$ is the logistic function, $\\mathrm{sg}(x)$ is $x$ without gradient, $\\exp^{+}(x)$ is
$e^{\\min(x, 40)}$; $L(z; t)$ is $-t \\cdot \\log \\sigma(z) - (1 - t) \\cdot \\log \\sigma(-z)$.
Other Greek letters are hyperparameters: $\\epsilon$ is `label_smoothing`, and in clipped objectives
the range of the clip. Each family has letters of its own, and its page says more about them:"""
_LETTERS = {
    "pairs": r"$a$, $b$ the log-ratios of chosen and rejected, $\Delta = a - b$; $c$, $r$ their "
    r"log-probabilities, $c_{0}$, $r_{0}$ those of the reference, $\hat{c}$, $\hat{r}$ averages "
    r"per token; $n_{c}$, $n_{r}$ numbers of scored tokens; $s_{w}$, $s_{l}$ scores of chosen and "
    r"rejected; $y$, $y_{0}$ a third sequence under policy and reference",
    "tokens": r"$l_{t}$ the log-ratio of a token, $\mathrm{kl}_{t}$ the KL(reference‖policy) at "
    r"its position, $\sum_{m}$ a sum over scored positions",
    "groups": r"of member $k$: $h_{k} = \beta \cdot \mathrm{logratio}_{k}$, the score $S_{k}$, the "
    r"log-probability per token $\hat{s}_{k}$",
    "singles": r"$x$ the log-ratio of the row",
    "policy_gradient": r"$w$ the ratio of policy to old policy, of a token or of the row; $A$ the "
    r"advantage; $x_{t} = \mathrm{logp}_{t} - \mathrm{old}_{t}$",
    "distillation": r"$s$, $t$ the log-softmax of student and teacher, $p_{S}$, $p_{T}$ their "
    r"probabilities",
    "rewards": r"$r_{w}$, $r_{l}$ the rewards of chosen and rejected",
    "denoising": r"$e$ the squared denoising error",
}


def pages() -> dict[str, str]:
    """Text by path below docs/. Only what the library ships."""
    shipped = {
        family: [entry for entry in map(lookup, keys) if _shipped(entry)]
        for family, keys in families().items()
    }
    found = {f"objectives/{name}.md": _page(name, entries) for name, entries in shipped.items()}
    return {"objectives.md": _overview(shipped), **found}


def _shipped(entry: Entry) -> bool:
    return entry.function.__module__.startswith(PACKAGE)


def _overview(shipped: dict[str, list[Entry]]) -> str:
    """One table for each family."""
    known, transforms = count(), len(shipped["transforms"])
    told = f"{known} objectives and {transforms} transforms, by family."
    blocks = [_NOTE, "# Objectives", told, _INTRO, _letters()]
    for family, entries in shipped.items():
        page = f"objectives/{family}.md"
        blocks += [f"## {TITLES[family]}", f"[{_count(entries)}]({page}). {_sentence(family)}"]
        rows = [f"| {_told(entry, page)} | {formula(entry)} |" for entry in entries]
        blocks.append("\n".join(["| key, paper | formula |", "| --- | --- |", *rows]))
    return "\n\n".join([*blocks, *_quantities()]) + "\n"


def _letters() -> str:
    rows = [f"| {TITLES[family].lower()} | {text} |" for family, text in _LETTERS.items()]
    return "\n".join(["| family | letters |", "| --- | --- |", *rows])


def count() -> int:
    """Of the objectives that the library ships, transforms apart."""
    return sum(
        _shipped(lookup(key))
        for name, keys in families().items()
        for key in keys
        if name != "transforms"
    )


def _quantities() -> Iterator[str]:
    yield "## Quantities"
    yield (
        "`fastpo.quantities` derives sums, lengths and log-ratios from token log-probabilities "
        "([an example](primitives.md#from-statistics-to-a-loss)). Add any other one with "
        "`q | {name: tensor}`. An objective's entry says if its shape is narrower than here. "
        "Labels that are neither 0 nor 1, groups that do not ascend, and NaN scores by which rows "
        "are compared are errors on a CPU. On a GPU and in a compiled function nobody waits for "
        "them: the loss and its gradient are NaN."
    )
    rows = []
    for name, meaning in MEANINGS.items():
        first = sides(name)[0]
        mark = " ∂" if first in DIFFERENTIABLE else ""
        shape = " or ".join(f"[{', '.join(one)}]" for one in SHAPES[first])
        rows.append(
            f"| {', '.join(f'`{one}`' for one in sides(name))} | {shape}{mark} | {meaning} |"
        )
    yield "\n".join(["| name | shape | meaning |", "| --- | --- | --- |", *rows])


def _count(entries: list[Entry]) -> str:
    return f"{len(entries)} entries in full"


def _link(entry: Entry, page: str = "") -> str:
    aliases = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
    return f"[`{entry.key}`]({page}#{entry.key}){aliases}"


def _told(entry: Entry, page: str) -> str:
    return "<br>".join(filter(None, (_link(entry, page), _paper(entry))))


def _page(family: str, entries: list[Entry]) -> str:
    head = "| key | quantities | defaults |\n| --- | --- | --- |\n"
    table = head + "\n".join(f"| {' | '.join(_row(entry))} |" for entry in entries)
    blocks = [_NOTE, f"# {TITLES[family]}", _sentence(family)]
    blocks += [f"Notation and shapes: [all objectives](../objectives.md). {_PICTURES}", table]
    modules = groupby(entries, lambda entry: entry.function.__module__)
    for module, members in [(name, list(found)) for name, found in modules]:
        blocks += _heading(module, alone=len(members) == len(entries))
        for entry in members:
            blocks += _entry(entry)
    return "\n\n".join(blocks) + "\n"


_PICTURES = (
    "The site that `make docs` builds plots loss and gradient of each objective of a margin or a "
    "log-ratio."
)


def _row(entry: Entry) -> Iterator[str]:
    _, names, defaults, _ = _describe.cells(entry)
    yield _link(entry)
    for words in (names, defaults):
        yield ", ".join(f"`{word}`" for word in words)


def _heading(module: str, alone: bool) -> Iterator[str]:
    """What the module is about, and its letters."""
    first, *rest = _paragraphs(importlib.import_module(module))
    title = re.sub(r"( All return .*|\. Family .*)$", "", first).rstrip(".")
    yield "## Entries" if alone else f"## {title}"
    text = [p for p in rest if not re.match(r"The family outgrows|Siblings|  ", p)]
    returned = re.search(r"All return [^.]*\.", first)
    if returned and not alone:
        text.append(returned[0])
    yield from (re.sub(r'^Family "\w+"[^.]*\. ?', "", p) for p in text)


def _paragraphs(documented: object) -> list[str]:
    text = inspect.cleandoc(getattr(documented, "__doc__", None) or "")
    return [p if p.startswith("  ") else " ".join(p.split()) for p in text.split("\n\n")]


def _sentence(family: str) -> str:
    return _paragraphs(importlib.import_module(f"{PACKAGE}.{family}"))[0]


def _entry(entry: Entry) -> Iterator[str]:
    yield f"### {entry.key}"
    also = f"Also {', '.join(f'`{alias}`' for alias in entry.aliases)}." if entry.aliases else ""
    if also or entry.paper:
        yield " ".join(filter(None, (_paper(entry) + "." * bool(entry.paper), also)))
    yield formula(entry)
    yield f"```text\n{_describe.whole(entry)}\n```"


def _paper(entry: Entry) -> str:
    return re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.paper)


def formula(entry: Entry) -> str:
    """The first paragraph of the docstring, its mathematics as LaTeX."""
    keys = {key for members in families().values() for key in members}
    names = {*quantities_of(entry.function), *entry.parameters, *entry.outputs, *keys}
    return rendered(_paragraphs(inspect.unwrap(entry.function))[0], names)


def main() -> None:
    for name, text in pages().items():
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

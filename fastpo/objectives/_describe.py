"""The table of objectives as text.

    describe()        every entry: what it needs, its defaults, its paper
    describe("dpo")   one entry in full

`docs/_ext/objective_pages.py` writes the documentation's pages from the same.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterator

from ._quantities import DIFFERENTIABLE, Shapes
from ._registry import Entry, families, lookup, quantities_of

_WIDTHS = (26, 40, 32, 17)
_HEADER = ("key", "quantities", "defaults", "paper")
_LEGEND = "? may be absent"


def describe(key: str | None = None, *, family: str | None = None) -> str:
    """The table as text, or the whole entry of a key or alias.

    family: only that part of the table. Raises ValueError for an unknown key or family, and both.
    """
    known = families()
    if family is not None and family not in known:
        raise ValueError(f"family: expected one of {', '.join(known)}, got {family!r}")
    if key is not None:
        if family is not None:
            raise ValueError(f"family: expected none beside the key {key!r}, got {family!r}")
        return whole(lookup(key))
    chosen = known if family is None else {family: known[family]}
    parts = [_table(home, keys) for home, keys in chosen.items() if keys]
    return "\n\n".join([*parts, _LEGEND])


def _sentence(family: str) -> str:
    """The first line of the family's module."""
    return (inspect.getdoc(importlib.import_module(f".{family}", __package__)) or "").split("\n")[0]


def cells(entry: Entry) -> tuple[list[str], list[str], list[str], list[str]]:
    """What the table says of an entry, as words that may be wrapped between."""
    aliases = [f"({', '.join(entry.aliases)})"] if entry.aliases else []
    names = [n + "?" * (not needed) for n, needed in quantities_of(entry.function).items()]
    defaults = [f"{name}={value!r}" for name, value in _defaults(entry).items()]
    return [entry.key, *aliases], names, defaults, entry.paper.split(", ")


def _defaults(entry: Entry) -> dict[str, object]:
    signature = inspect.signature(entry.function).parameters
    return {name: signature[name].default for name in entry.parameters}


def _table(family: str, keys: tuple[str, ...]) -> str:
    lines = [f"{family} ({len(keys)}): {_sentence(family)}", ""]
    lines += _row(*([title] for title in _HEADER))
    for entry in map(lookup, keys):
        lines += _row(*cells(entry))
    return "\n".join(lines)


def _row(*cells: list[str]) -> Iterator[str]:
    """The lines of one row: cells wrapped to their columns, side by side."""
    key, *lists = cells
    columns = [_wrap(" ".join(key), _WIDTHS[0])]
    columns += [
        _wrap(", ".join(words), width) for words, width in zip(lists, _WIDTHS[1:], strict=True)
    ]
    for i in range(max(map(len, columns))):
        parts = [column[i] if i < len(column) else "" for column in columns]
        padded = (part.ljust(width) for part, width in zip(parts, _WIDTHS, strict=True))
        yield "  ".join(padded).rstrip()


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def whole(entry: Entry) -> str:
    parts = [_title(entry), _signature(entry), _text(entry)]
    quantities = [_quantity(entry, *item) for item in quantities_of(entry.function).items()]
    parts.append(_section("quantities", quantities))
    defaults = _defaults(entry)
    hyper = [(f"{n}={defaults[n]!r}", p.expected) for n, p in entry.parameters.items()]
    parts.append(_section("hyperparameters", hyper))
    parts.append(_section("gives", [(name, "") for name in entry.outputs]))
    if entry.before is not None:
        parts.append(_fill("only before: ", sorted(entry.before)))
    if entry.refuses_weights:
        parts.append("refuses pair_weights: the rows are not the batch's rows")
    return "\n\n".join(filter(None, parts))


def _title(entry: Entry) -> str:
    title = f"{entry.key} ({entry.family})"
    if entry.aliases:
        title += f", also {', '.join(entry.aliases)}"
    return title + (f"\n{entry.paper}" if entry.paper else "")


def _signature(entry: Entry) -> str:
    """The signature without annotations: they are the two lists below it."""
    bare = [
        str(parameter.replace(annotation=inspect.Parameter.empty))
        for parameter in inspect.signature(entry.function).parameters.values()
    ]
    if entry.parameters:
        bare.insert(len(bare) - len(entry.parameters), "*")
    return _fill(f"{entry.key}(", bare, end=")")


def _fill(start: str, words: list[str], end: str = "") -> str:
    """Words behind `start`, wrapped and indented to where they began."""
    indent = " " * len(start)
    text = start + ", ".join(words) + end
    return textwrap.fill(text, 98, subsequent_indent=indent, break_long_words=False)


def _text(entry: Entry) -> str:
    """The function's own docstring; the table's lines that follow it are the lists here."""
    return inspect.cleandoc(inspect.unwrap(entry.function).__doc__ or "")


def _quantity(entry: Entry, name: str, needed: bool) -> tuple[str, str]:
    carries = name in DIFFERENTIABLE or name in entry.gradient_into
    mark = "∂" if carries else " "
    notes = _shape_text(entry.shapes[name]) + ("" if needed else ", may be absent")
    return f"{mark} {name}", notes


def _shape_text(shapes: Shapes) -> str:
    return " or ".join(f"[{', '.join(shape)}]" for shape in shapes)


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max((len(left) for left, _ in rows), default=0)
    lines = [f"  {left.ljust(width)}  {right}".rstrip() for left, right in rows]
    return "\n".join([title, *lines]) if rows else ""

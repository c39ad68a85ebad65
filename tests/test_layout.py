"""The house as CONTRIBUTING.md draws it: who imports whom, no circles, nothing too large."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_FILES, MOST_LINES, MOST_OF_A_FUNCTION = 16, 400, 40
# Larger than that; they may only become smaller.
CROWDED = {"fastpo/objectives": 26}
LONG: dict[str, int] = {}

FOLDERS = ("fastpo", "kernels")
PATHS = {
    path.relative_to(ROOT).as_posix() for top in FOLDERS for path in (ROOT / top).rglob("*.py")
} - {"fastpo/kernels/__init__.py"}  # it only gives kernels/ its name


def module_of(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    parts = ("fastpo", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PATHS)}


@functools.cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Import:
    """A module, or a name of one, and what it is called from there on."""

    path: str
    line: int
    module: str
    name: str | None
    alias: str

    def __str__(self) -> str:
        whole = self.module if self.name is None else f"{self.module}.{self.name}"
        return f"{self.path}:{self.line} imports {whole}"

    @property
    def target(self) -> str | None:
        """The file that is imported; None for other packages."""
        return "_C" if self.module == "fastpo._C" else MODULES.get(self.module)


def imports_of(path: str) -> Iterator[Import]:
    """Those in functions and for type checkers, too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, None, alias.asname or alias.name)
        if isinstance(node, ast.ImportFrom):
            source = absolute(path, node)
            for alias in node.names:
                whole, called = f"{source}.{alias.name}", alias.asname or alias.name
                if whole in MODULES or whole == "fastpo._C":
                    yield Import(path, node.lineno, whole, None, called)
                else:
                    yield Import(path, node.lineno, source, alias.name, called)


def absolute(path: str, node: ast.ImportFrom) -> str:
    package = module_of(path).split(".")
    if not path.endswith("__init__.py"):
        package.pop()
    above = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


IMPORTS = [found for path in sorted(PATHS) for found in imports_of(path)]


@functools.cache
def table() -> dict[str, frozenset[str]]:
    """Folder or file -> what it may import, by the table in CONTRIBUTING.md."""
    rows = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith(tuple(f"`{top}/" for top in FOLDERS)):
            rows[cells[0].strip("`").rstrip("/")] = frozenset(re.findall(r"[\w/.]+", cells[2]))
    return rows


def row_of(path: str) -> str:
    """The file's own, else that of its folder."""
    return path if path in table() or path == "_C" else path.rpartition("/")[0]


def called(found: Import) -> tuple[str, str]:
    """How a row may call what is imported: the file or its folder, or the package."""
    if found.target is None:
        package = found.module.partition(".")[0]
        return package, package
    return found.target.removeprefix("fastpo/"), row_of(found.target).removeprefix("fastpo/")


def leaves(found: Import) -> bool:
    """Whether an import leaves its row, for anything but the standard library."""
    if found.target is None:
        return found.module.partition(".")[0] not in sys.stdlib_module_names
    return row_of(found.target) != row_of(found.path)


@pytest.mark.parametrize("row", [row for row in table() if "all" not in table()[row]])
def test_a_row_says_what_is_imported(row: str) -> None:
    """No more than it allows, and no less."""
    allowed = table()[row]
    outside = [found for found in IMPORTS if row_of(found.path) == row and leaves(found)]
    assert not [str(found) for found in outside if not allowed & {*called(found)}]
    used = {next(name for name in called(found) if name in allowed) for found in outside}
    assert used == allowed


def test_every_folder_has_a_row() -> None:
    assert {path.rpartition("/")[0] for path in PATHS} <= set(table())
    assert all((ROOT / row).exists() for row in table())


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_files_that_are_named_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    folder = r"\b(?:fastpo|kernels|tests|examples|benchmarks)/"
    named = re.findall(folder + r"[\w/]+\.(?:py|json|sh)\b", text)
    assert not {name for name in named if not (ROOT / name).exists()}


def test_no_circles() -> None:
    """Of modules, wherever in them an import stands."""
    graph: dict[str, set[str]] = {path: set() for path in PATHS}
    for found in IMPORTS:
        if found.target not in (None, found.path):
            graph[found.path].add(str(found.target))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_private_names_stay_in_their_module() -> None:
    """Device functions of kernels/ keep theirs: `_max` and `_exp` without would hide others."""
    ours = [found for found in IMPORTS if found.target and found.path.startswith("fastpo/")]
    borrowed = [str(found) for found in ours if is_private(found.name or "")]
    for path in {found.path for found in ours}:
        modules = {f.alias for f in ours if f.path == path and f.name is None}
        read = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)]
        for node in read:
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if owner in modules and is_private(node.attr):
                borrowed.append(f"{path}:{node.lineno} reads {owner}.{node.attr}")
    assert not borrowed


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_folders_are_not_crowded() -> None:
    counts: dict[str, int] = {}
    for path in PATHS:
        folder, _, name = path.rpartition("/")
        counts[folder] = counts.get(folder, 0) + (name != "__init__.py")
    crowded = {folder: n for folder, n in counts.items() if n > MOST_FILES}
    assert crowded.keys() == CROWDED.keys()
    assert all(n <= CROWDED[folder] for folder, n in crowded.items()), crowded


def test_files_are_not_long() -> None:
    lines = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in PATHS}
    assert not {path: n for path, n in lines.items() if n > MOST_LINES}


def test_functions_are_not_long() -> None:
    """Below signature and docstring; a kernel is as long as its mathematics."""
    found = {
        f"{path}:{node.name}": length(node)
        for path in PATHS
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and length(node) > MOST_OF_A_FUNCTION
    }
    assert {name: n for name, n in found.items() if name.startswith("fastpo/")} == LONG


def length(function: ast.FunctionDef) -> int:
    first = function.body[ast.get_docstring(function) is not None :]
    return (function.end_lineno or 0) - first[0].lineno + 1 if first else 0


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them by it, and collects nothing from the second one."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []

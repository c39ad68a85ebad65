"""Tensors made from nothing say their dtype and device: the defaults of both are the user's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COVERED = (
    "fastpo/integrations",
    "fastpo/ops",
    "fastpo/objectives",
    "fastpo/planner.py",
    "fastpo/quantities.py",
    "fastpo/reference.py",
    "fastpo/testing.py",
    "kernels",
)
SAID = {"dtype", "device"}
FACTORIES = {
    *("arange", "asarray", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros"),
}


def unsaid(source: str) -> Iterator[str]:
    """Calls of torch's factories without dtype or device, and factories by another name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            faulty = bool(FACTORIES.intersection(name.name for name in node.names))
        elif isinstance(node, ast.Call) and _is_factory(node.func):
            said = {keyword.arg for keyword in node.keywords}
            # None: **options, which may say both.
            faulty = not said >= SAID and None not in said
        else:
            continue
        if faulty:
            yield f"{node.lineno}: {ast.unparse(node)}"


def _is_factory(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute) or function.attr not in FACTORIES:
        return False
    return ast.unparse(function.value) == "torch"


@pytest.mark.parametrize("place", COVERED)
def test_dtype_and_device_are_said(place):
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    found = [f"{file.relative_to(ROOT)}:{x}" for file in files for x in unsaid(file.read_text())]
    assert not found, "\n".join(found)


def test_what_the_rule_sees():
    unsound = "torch.zeros(3)\ntorch.arange(n, device=d)\nfrom torch import ones, Tensor\n"
    sound = "torch.zeros(3, dtype=t, device=d)\ntorch.rand(3, **draw)\ntorch.zeros_like(x)\n"
    assert sorted(line.split(":")[0] for line in unsaid(unsound + sound)) == ["1", "2", "3"]

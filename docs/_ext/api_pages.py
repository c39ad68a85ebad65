"""The API: signatures as their source has them, and docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator

import fastpo
from fastpo import objectives, quantities

GROUPS: dict[str, tuple[str, ...]] = {
    "Log-probabilities": (
        "linear_logps",
        "TokenStats",
        "multi_head_logps",
        "multi_token_logps",
        "mixed_linear_logps",
    ),
    "Words of a sampler": ("Support", "diagnose", "Mismatch"),
    "Quantised heads": ("tile_source", "TileSource", "BlockScaled", "NVFP4", "PackedIntegers"),
    "A head in shards": (
        "vocab_parallel_logps",
        "vocab_parallel_divergence",
        "vocab_parallel_topk",
        "vocab_parallel_mixed_logps",
    ),
    "Divergences": ("linear_divergence", "linear_topk_divergence", "DivergenceStats"),
    "Best words": ("linear_topk", "TopK", "sample_topk", "TokenSample"),
    "Models": ("attach", "lazy_logits", "shared_prompts"),
    "Trainers of TRL": ("patch", "unpatch", "patched", "GroupTrainer"),
    "Planning": ("plan", "Plan", "plan_step", "StepPlan"),
}
MODULES = {"fastpo.quantities": quantities, "fastpo.objectives": objectives}
_ARGUMENT = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ")


def text() -> str:
    """Below the page's first lines."""
    named = {name for names in GROUPS.values() for name in names}
    modules = {name for name in fastpo.__all__ if inspect.ismodule(getattr(fastpo, name))}
    others = [name for name in fastpo.__all__ if name not in {*named} | modules]
    blocks = []
    for title, names in {**GROUPS, **({"More": others} if others else {})}.items():
        blocks.append(f"## {title}")
        for name in (name for name in names if name in fastpo.__all__):
            blocks += _entry(f"fastpo.{name}", getattr(fastpo, name))
    for path, module in MODULES.items():
        blocks += [f"## {path}", _markdown(inspect.getdoc(module) or "")]
        for name, member in _members(module):
            blocks += _entry(f"{path}.{name}", member)
    return "\n\n".join(["", *blocks]) + "\n"


def _members(module: object) -> Iterator[tuple[str, object]]:
    """Its public functions and classes that have something to say, the objectives apart."""
    names = getattr(module, "__all__", None) or vars(module)
    home = getattr(module, "__name__", "")
    for name in names:
        member = getattr(module, name)
        documented = inspect.isfunction(member) or inspect.isclass(member)
        if not name.startswith("_") and documented and member.__module__.startswith(home):
            yield name, member


def _entry(path: str, member: object) -> Iterator[str]:
    yield f"### {path}"
    yield f"```python\n{signature(member)}\n```"
    yield _markdown(inspect.getdoc(member) or "")


def signature(member: object) -> str:
    """The lines from `def` or `class` to the docstring."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(member)))  # type: ignore[arg-type]
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        lines += [line for n in fields for line in source.splitlines()[n.lineno - 1 : n.end_lineno]]
    return "\n".join(lines)


def _markdown(docstring: str) -> str:
    return "\n\n".join(_paragraph(part) for part in docstring.split("\n\n"))


def _paragraph(text: str) -> str:
    """Arguments become a list, indented text stays the code it is."""
    if not _ARGUMENT.match(text) or text.startswith("    "):
        return text
    lines = [_ARGUMENT.sub(r"- **\1**: ", line) for line in text.splitlines()]
    return "\n".join(line if line.startswith("- ") else f"  {line.strip()}" for line in lines)

"""What the site has beyond the Markdown that GitHub shows: navigation, pictures, the API, MathML.

Nothing here asks the network: formulas are MathML, pictures SVG in the page, so that both follow
the reader's light or dark colours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import api_pages
import curve_pictures
import report_pictures
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from objective_pages import TITLES
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

logger = getLogger(__name__)
DOCS = Path(__file__).parents[1]
NAVIGATION = {
    "": {"Start": "self", "How it works": "how-it-works", "Installing": "installing"},
    "Use it": {
        "Trainers": "drop-in",
        "Any objective, by name": "training",
        "Objectives": "objectives",
        "Lazy logits": "lazy-logits",
        "Frameworks": "frameworks",
        "Primitives": "primitives",
    },
    "Longer, larger": {
        "Longer contexts": "longer-contexts",
        "Shared prompts": "shared-prompts",
        "Many devices": "many-devices",
        "Planning": "planning",
        "Matching a sampler": "sampler",
    },
    "What it is worth": {
        "Benchmarks": "benchmarks",
        "Kernels": "kernels",
        "Architectures": "architectures",
        "Reliability": "reliability",
        "Limits": "limits",
    },
    "Look it up": {"FAQ": "faq", "API": "api", "Changelog": "changelog"},
}
_IMAGE = re.compile(r"^!\[([^\]]*)\]\((pictures/\w+\.svg)\)$", re.M)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("source-read", _completed)
    app.connect("build-finished", _checked)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _completed(app: Sphinx, name: str, source: list[str]) -> None:
    """The page as the site has it."""
    text = _IMAGE.sub(_inlined, source[0])
    if name == "index":
        text += "".join(_toctree(caption, pages) for caption, pages in NAVIGATION.items())
    elif name == "objectives":
        text += _toctree("", {title: f"objectives/{name}" for name, title in TITLES.items()})
    elif name.startswith("objectives/"):
        text = curve_pictures.added(text)
    elif name == "api":
        text += api_pages.text()
    elif name == "changelog" and (DOCS.parent / "CHANGELOG.md").exists():
        text = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    source[0] = report_pictures.added(text)


def _checked(app: Sphinx, error: Exception | None) -> None:
    """What was written: no formula is left as LaTeX, no mark of a picture as it stood."""
    for page in sorted(Path(app.outdir).rglob("*.html")) if error is None else ():
        left = re.search(r"\\(?:cdot|log|sum|texttt)\b|<!-- plot:|!\[", page.read_text("utf-8"))
        if left:
            logger.warning("%s: %r is not rendered", page.relative_to(app.outdir), left[0])


def _toctree(caption: str, pages: dict[str, str]) -> str:
    there = {t: p for t, p in pages.items() if p == "self" or (DOCS / f"{p}.md").exists()}
    lines = [f"{title} <{page}>" for title, page in there.items()]
    head = ["", "", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), ""]
    return "\n".join([*head, *lines, "```", ""])


def _inlined(found: re.Match[str]) -> str:
    """In the page its colours are the page's."""
    alt, name = found.groups()
    svg = (DOCS / name).read_text(encoding="utf-8")
    body = re.sub(r"\n\s*", " ", svg[svg.index("<svg") :])
    return f'<figure class="picture" role="img" aria-label="{alt}">{body}</figure>'


def _inline(writer: Any, node: Any) -> None:
    writer.body.append(mathml(node.astext(), "inline"))
    raise SkipNode  # its text is the LaTeX


def _block(writer: Any, node: Any) -> None:
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


def mathml(latex: str, display: str) -> str:
    found = convert(latex.replace("'", "′"), display=display).replace(r"\_", "_")
    # A name of several letters is set without the space behind it.
    return re.sub(
        r"(<mi>(?:log|max|min|exp)</mi>)(?=<m[ins])", r'\1<mspace width="0.167em" />', found
    )

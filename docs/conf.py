"""The site: `make docs` builds it into build/site, offline, with warnings as errors."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

project = "fastpo"
release = version = installed("fastpo")
copyright = "the fastpo authors, Apache-2.0"

extensions = ["myst_parser", "sphinx_copybutton", "site_pages"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = "fastpo"
html_theme_options = {
    f"{theme}_css_variables": {"color-brand-primary": accent, "color-brand-content": accent}
    for theme, accent in {"light": "#0b6e8a", "dark": "#3fb0d0"}.items()
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["filter.js"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
pygments_style, pygments_dark_style = "default", "native"
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
# What GitHub shows as a code block is one here.
highlight_language = "text"
nitpicky = True

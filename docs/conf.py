"""The site of these pages: make docs."""

import tomllib
from pathlib import Path

project = "relex"
release = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "version"
]
extensions = ["myst_parser"]
# GitHub makes the same anchors, so that a link works in both.
myst_heading_anchors = 3
html_theme = "furo"
html_title = "relex"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

"""Put the SVGs of docs/figures.py into the page itself, where they follow its theme and its font.

An ``<img>`` would know neither the reader's choice between light and dark nor the page's colours.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

FOLDER = "_static/figures/"


def visit_image(self: HTML5Translator, node: nodes.image) -> None:
    uri = node["uri"]
    if not (uri.startswith(FOLDER) and uri.endswith(".svg")):
        type(self).visit_image(self, node)
        return
    text = (Path(self.builder.srcdir) / uri).read_text(encoding="utf-8")
    size = re.compile(r' (width|height)="[^"]*pt"')  # the style sheet gives another
    label = escape(node["alt"])
    start = f'<svg class="figure" role="img" aria-label="{label}"'
    self.body.append(size.sub("", text, count=2).strip().replace("<svg", start, 1))


def depart_image(self: HTML5Translator, node: nodes.image) -> None:
    pass


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(nodes.image, override=True, html=(visit_image, depart_image))
    app.add_css_file("figures.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Render mathematics as MathML, which browsers draw themselves: no script, no font, no network.

Docutils, which Sphinx needs anyway, holds the converter from LaTeX. A formula that it cannot
convert is a warning, hence an error in a strict build.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

# LaTeX that the converter does not know, in terms that it does: fractions without braces, an
# operator's star (which it would print), a style in mid-formula, the lines above and below a
# formula of which torch's docstrings are fond.
SPELLINGS = (
    (re.compile(r"\\([td]?frac) *(\\[A-Za-z]+|\w) *(\\[A-Za-z]+|\w)"), r"\\\1{\2}{\3}"),
    (re.compile(r"\\operatorname\*"), r"\\operatorname"),
    (re.compile(r"\\dots\b"), r"\\ldots"),
    (re.compile(r"\\textstyle\b"), ""),
    (re.compile(r"(\\\\)?\s*&?\\rule\{[^}]*\}\{[^}]*\}\s*(\\\\)?"), ""),
)
# What it leaves out, so that a browser draws what LaTeX would: real primes, functions without the
# space of operators, full-size fractions in rows, fences of natural height (\bigl and the like ask
# for another) that are no infix operators.
TOUCHES = (
    (re.compile("<mo>'</mo>"), "<mo>′</mo>"),
    (re.compile("<mo>(max|min)</mo>"), r'<mo lspace="0.1em" rspace="0.1em">\1</mo>'),
    (re.compile('<mtable class="ams-align">'), '<mtable class="ams-align" displaystyle="true">'),
)
FENCE = re.compile(r'<mo(?: class="mathopen"| stretchy="false")?>([‖|⟨⟩⌊⌋])</mo>')
ENVIRONMENT = re.compile(r"\\begin\{(\w+)\}.*?\\end\{\1\}", re.DOTALL)


def mathml(source: str, node: nodes.Element, *, block: bool) -> str:
    tex = source
    for pattern, replacement in SPELLINGS:
        tex = pattern.sub(replacement, tex)
    if block and re.search(r"\\\\|&", ENVIRONMENT.sub("", tex)):
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"  # as Sphinx does for LaTeX
    try:
        tree = tex2mathml(tex, as_block=block)
    except (MathError, SyntaxError) as error:
        logger.warning("cannot render %r: %s", source, error, location=node)
        return f"<code>{escape(source)}</code>"
    # On one line, or the line breaks of the pretty-printed tree would show as spaces.
    line = "".join(part.strip() for part in tree.splitlines())
    for pattern, replacement in TOUCHES:
        line = pattern.sub(replacement, line)
    line = fences(line)
    if "\\" in line:
        logger.warning("cannot render %r: a command was taken for text", source, location=node)
    label = escape(" ".join(source.split()))
    return line.replace("<math ", f'<math alttext="{label}" ', 1)


def pieces(source: str) -> list[str]:
    """Formulas with a wide space in between, which a narrow page puts below each other."""
    environments: list[str] = []

    def hide(match: re.Match[str]) -> str:
        environments.append(match[0])
        return f"\0{len(environments) - 1}\0"

    hidden = ENVIRONMENT.sub(hide, source)
    if re.search(r"\\\\|&", hidden):
        return [source]
    parts = re.split(r"\\qquad|(?<=,) *\\quad\b", hidden)
    return [re.sub("\0(\\d+)\0", lambda match: environments[int(match[1])], it) for it in parts]


def fences(line: str) -> str:
    opened: set[str] = set()

    def fence(match: re.Match[str]) -> str:
        sign = match[1]
        opens = sign in "⟨⌊" or (sign in "‖|" and sign not in opened)
        (opened.add if opens else opened.discard)(sign)
        return f'<mo form="{"prefix" if opens else "postfix"}" stretchy="false">{sign}</mo>'

    return FENCE.sub(fence, line)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), node, block=False))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    # Furo's wrapper has the same id already.
    anchor = nodes.Element() if node.parent.get("ids") == node["ids"] else node
    self.body.append(self.starttag(anchor, "div", CLASS="math-block"))
    parts = [mathml(part, node, block=True) for part in pieces(node.astext())]
    self.body.append(f"<div>{''.join(f'<div>{part}</div>' for part in parts)}</div>")
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer(
        "native", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}

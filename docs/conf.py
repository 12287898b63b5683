"""Sphinx configuration.

Build: python -m sphinx -n -W --keep-going -b html docs docs/_build/html
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]  # document this checkout, installed or not

import dfw_opt  # noqa: E402

project = "dfw-opt"
author = "the dfw-opt authors"
copyright = author
version = release = dfw_opt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_autodoc_typehints",
    "inline_svg",
    "native_math",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
html_math_renderer = "native"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
typehints_defaults = "comma"
always_use_bars_union = True

# Links to other projects would need their inventories, that is, the network: a strict build has to
# work without it, so names outside this package stay unlinked.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|typing|abc|logging|optparse|os)(\..*)?"),
    (
        r"py:.*",
        r"(bool|bytes|dict|float|int|list|object|str|tuple|type|None|Any|Callable|Iterable)",
    ),
    (r"py:exc", r".*(Error|Warning|Exception)"),
    (r"py:data", r"NEWTON_SCHULZ"),
    # What an optimizer has is in two files, whose classes name each other's members.
    (r"py:(meth|attr)", r"(step|watch_loss|gamma|skipped_steps)"),
]

html_theme = "furo"
html_title = f"dfw-opt {release}"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_copy_source = False
html_show_sourcelink = False

doctest_global_setup = "import torch\nfrom dfw_opt import *\ntorch.manual_seed(0)"

# Warnings about other projects' code are theirs to act on.
warnings.filterwarnings("ignore", module="sphinx_autodoc_typehints")

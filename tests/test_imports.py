"""What imports what: the core can be read alone, and the package needs torch alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dfw_opt

PACKAGE = Path(dfw_opt.__file__).parent
AROUND = {
    *("validate", "checkpoint", "sharding", "lifecycle", "watch_loss"),
    *("averaging", "packed", "summary"),
}
CORE = {"optimizer", "step_size", "norms", "variables", "quantizers"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports at run time, without the package's name."""
    found = set()
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("dfw_opt.") for name in found if name.startswith("dfw_opt.")}
    return {name.split(".")[0] for name in names}


def test_the_core_stands_alone() -> None:
    """The step imports what surrounds it through one module; its parts know nothing of that."""
    seen = set()
    for name, path in MODULES.items():
        part = name.split(".")[0]
        if part in CORE:
            seen.add(part)
            assert imported(path) & AROUND == ({"lifecycle"} if part == "optimizer" else set())
    assert seen == CORE


def test_imports_go_one_way() -> None:
    """No module imports itself by way of others."""
    graph = {name.split(".")[0]: set[str]() for name in MODULES}
    for name, path in MODULES.items():
        part = name.split(".")[0]
        graph[part] |= imported(path) - {part}
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("part", sorted(CORE))
def test_the_core_speaks_of_mathematics_only(part: str) -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] == part:
            lines = path.read_text().splitlines()
            assert [x for x in lines if re.search("device|shard|kernel|compil", x, re.I)] == []


def test_torch_is_all_it_needs() -> None:
    """In a new process: what importing the package brings in beyond torch is its own."""
    code = """
import sys, torch
before = set(sys.modules)
import dfw_opt
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"dfw_opt", "torch"} - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in dfw_opt.__all__:
        assert hasattr(dfw_opt, name)
    assert {"DFW", "ProjectedDFW", "TernaryDFW", "param_groups"} <= {*dfw_opt.__all__}

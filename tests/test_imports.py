"""What imports what: the core can be read alone, and the package needs torch alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dfw_opt

PACKAGE = Path(dfw_opt.__file__).parent
AROUND = {"validate", "checkpoint", "sharding", "lifecycle", "watch_loss"}
AROUND |= {"averaging", "packed", "summary"}
CORE = {"optimizer", "step_size", "norms", "variables", "quantizers"}
# Each file with the part that it belongs to: its own name, or its folder's.
FILES = [(p.relative_to(PACKAGE).with_suffix("").parts[0], p) for p in PACKAGE.rglob("*.py")]


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports at run time."""
    tree = ast.parse(path.read_text())
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    hidden = [g for g in guards if "TYPE_CHECKING" in ast.unparse(g.test)]
    unseen = {id(node) for guard in hidden for node in ast.walk(guard)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in unseen:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in unseen:
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("dfw_opt.")}


def test_the_core_stands_alone() -> None:
    """The step imports what surrounds it through one module; its parts know nothing of that."""
    for part, path in FILES:
        if part in CORE:
            assert imported(path) & AROUND == ({"lifecycle"} if part == "optimizer" else set())
    assert {part for part, _ in FILES} >= CORE


def test_imports_go_one_way() -> None:
    """No module imports itself by way of others."""
    left = {part: set[str]() for part, _ in FILES}
    for part, path in FILES:
        left[part] |= imported(path) - {part}
    while free := [part for part, needs in left.items() if not needs & left.keys()]:
        for part in free:
            del left[part]
    assert not left


@pytest.mark.parametrize("part", sorted(CORE))
def test_the_core_speaks_of_mathematics_only(part: str) -> None:
    for path in [path for other, path in FILES if other == part]:
        lines = path.read_text().splitlines()
        assert [x for x in lines if re.search("device|shard|kernel|compil", x, re.I)] == []


def test_torch_is_all_it_needs() -> None:
    """In a new process: what importing the package brings in beyond torch is its own."""
    code = """
import sys, torch
before = set(sys.modules)
import dfw_opt
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"dfw_opt", "torch"} - set(sys.stdlib_module_names)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    assert {"DFW", "ProjectedDFW", "TernaryDFW", "param_groups"} <= {*dfw_opt.__all__}
    assert all(hasattr(dfw_opt, name) for name in dfw_opt.__all__)

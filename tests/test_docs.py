"""Every Python block of the README and of the pages runs, in order, a namespace a page.

And what a page names exists: files of the repository, and the two commands that CI and readers run.
"""

import doctest
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dfw_opt.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Their blocks need an extra.
MARKS = {"frameworks.md": [pytest.mark.frameworks]}

FENCE = re.compile(r"^ *(?P<ticks>`{3,}|:{3,})(?P<info>[^`\n]*)$", re.MULTILINE)
# Languages and directives whose content nobody would try to run.
NOT_RUN = {"bash", "bibtex", "text", "{eval-rst}", "{include}", "{math}", "{toctree}"}


class Block(NamedTuple):
    page: Path
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    """The Python blocks of ``page``; fails on a fence whose content it does not know."""
    text, found, position = page.read_text(encoding="utf-8"), list[Block](), 0
    while opening := FENCE.search(text, position):
        closing = re.compile(rf"^ *{opening['ticks']} *$", re.MULTILINE).search(text, opening.end())
        line = text.count("\n", 0, opening.end()) + 1
        language = opening["info"].split()[0] if opening["info"].split() else ""
        assert closing, f"{page.name}:{line}: a fence is never closed"
        if language in {"python", "{doctest}"}:
            found.append(Block(page, line, text[opening.end() + 1 : closing.start()]))
        else:
            assert language in NOT_RUN, f"{page.name}:{line}: would {language!r} be run?"
        position = closing.end()
    return found


def run(block: Block, namespace: dict[str, Any]) -> None:
    if block.code.lstrip().startswith(">>>"):
        runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
        # get_doctest copies the namespace; names made in the block are carried back by hand.
        test = parser.get_doctest(
            block.code, namespace, block.page.name, str(block.page), block.line
        )
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        namespace.update(test.globs)
        assert runner.failures == 0, "".join(report)
    else:
        # Blank lines in front, so that a traceback names the line of the page.
        code = compile("\n" * block.line + block.code, str(block.page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=MARKS.get(page.name, []), id=page.name) for page in PAGES]
)
def test_every_python_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(QUANTIZERS):  # a page may add its own, which are taken away again
        monkeypatch.setitem(QUANTIZERS, name, QUANTIZERS[name])
    monkeypatch.setitem(QUANTIZERS, "quarters", QUANTIZERS["binary"])
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        run(block, namespace)


def test_a_wrong_block_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\n>>> x + 1\n3\n```\n", encoding="utf-8")
    first, second = blocks(page)
    namespace: dict[str, Any] = {}
    run(first, namespace)
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run(second, namespace)
    page.write_text("```pycon\n>>> 1\n2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="would 'pycon' be run"):
        blocks(page)


def test_pages_name_only_files_that_exist() -> None:
    """A path in backticks on a page is a path in the repository, unless it is built."""
    pattern = re.compile(r"`((?:dfw_opt|docs|examples|tests)/[\w./-]*\w\.\w+)`")
    found = [(page.name, name) for page in PAGES for name in pattern.findall(page.read_text())]
    assert len(found) > 20
    built = "docs/_build/"
    assert not [it for it in found if not it[1].startswith(built) and not (ROOT / it[1]).exists()]


def test_readme_has_both_commands_on_one_line_each() -> None:
    """`.ci/run` runs the second of these as it stands."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    setup = "python3 -m venv .venv && .venv/bin/python -m pip install torch==2.13.0"
    main, tests = [line for line in lines if line.startswith("python3 -m venv")]
    assert main.startswith(setup)
    assert main.endswith("&& .venv/bin/python examples/cifar_resnet20.py --table")
    assert tests.startswith(setup)
    assert tests.endswith("&& .venv/bin/python -m pytest")

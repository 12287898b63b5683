"""The figures in docs/ are what docs/figures.py makes of what the package computes now."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "_static" / "figures"


def _figures() -> Any:
    spec = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = _figures()
each_figure = pytest.mark.parametrize("name", figures.SOURCES)


def committed(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def numbers(value: Any) -> list[float]:
    """All numbers in what JSON can hold, in order."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [x for item in items for x in numbers(item)]
    return [value] if isinstance(value, float | int) else []


@pytest.mark.parametrize("name", sorted(figures.SOURCES.keys() - {"quick_start"}))
def test_numbers_are_what_the_package_computes(name: str) -> None:
    torch.set_num_threads(1)  # sums in the order that they were made in
    found, old = numbers(figures.SOURCES[name][0]()), numbers(committed(name))
    # Six digits are kept, and rounding differs from one processor to the next over 200 steps.
    assert found == pytest.approx(old, rel=1e-4, abs=1e-4)
    old[len(old) // 2] += 0.01 + 0.01 * abs(old[len(old) // 2])
    assert found != pytest.approx(old, rel=1e-4, abs=1e-4)


def test_the_quick_start_learns_as_shown(tmp_path: Path) -> None:
    """Within 4 points: a float32 training ends elsewhere on another processor."""
    with torch.random.fork_rng(devices=[]):
        found = figures.quick_start_data()["runs"]
    for run, old in zip(found, committed("quick_start")["runs"], strict=True):
        assert run["accuracy"] == pytest.approx(old["accuracy"], abs=0.04)
        assert run["bytes"] == old["bytes"]
        # The first ten steps differ by rounding only.
        assert run["gammas"][:10] == pytest.approx(old["gammas"][:10], abs=0.05)


@each_figure
def test_drawings_are_of_these_numbers(name: str) -> None:
    """The same words, and the same curves, up to the layout of another matplotlib."""
    text = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    drawn = figures.svg(name, figures.SOURCES[name][1], committed(name))
    old, new = (ElementTree.fromstring(it) for it in (text, drawn))
    assert _texts(old) == _texts(new)
    for one, other in zip(_curves(old), _curves(new), strict=True):
        assert one == pytest.approx(other, abs=3)


def _texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]


def _curves(root: ElementTree.Element) -> list[list[float]]:
    paths = (re.findall(r"-?\d[\d.e-]*", element.get("d", "")) for element in root.iter())
    return [[float(number) for number in path] for path in paths if len(path) > 20]


@each_figure
def test_drawings_are_a_part_of_one_page(name: str) -> None:
    """With the page's colours, ids of their own, and words for who cannot see them."""
    text = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert "<style" not in text
    assert not re.search(r"(?:fill|stroke): #", text)
    ids = [element.get("id") for element in ElementTree.fromstring(text).iter()]
    assert all(re.fullmatch(rf"{name}-\d+", own) for own in ids if own)
    figure = re.compile(rf"\.\. figure:: _static/figures/{name}\.svg\n +:alt: (.+(?:\n {{6}}.+)*)")
    (alt,) = [alt for page in DOCS.glob("*.md") for alt in figure.findall(page.read_text())]
    assert len(alt) > 40


def test_nothing_else_is_there() -> None:
    names = {f"{name}.{end}" for name in figures.SOURCES for end in ("svg", "json")}
    assert {path.name for path in FOLDER.iterdir()} == names | {"quick_start.txt"}

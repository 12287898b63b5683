"""The figures in docs/ are what docs/figures.py makes, and the pages tell what they show."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import quick_start
import torch

from dfw_opt import load_packed

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
NAMES = [(source, name) for source, those in figures.FIGURES.items() for name in those]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def committed(source: str) -> Any:
    return json.loads(read(FOLDER / f"{source}.json"))


def svg(name: str) -> str:
    return read(FOLDER / f"{name}.svg")


def assert_close(actual: Any, expected: Any, place: str = "") -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), place
        for key in expected:
            assert_close(actual[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), place
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_close(one, other, f"{place}[{i}]")
    else:
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6), place


@pytest.mark.parametrize("source", sorted(figures.SOURCES.keys() - {"quick_start"}))
def test_numbers_are_what_the_package_computes(source: str) -> None:
    assert_close(figures.rounded(figures.SOURCES[source]()), committed(source), source)


@pytest.mark.parametrize(("source", "name"), NAMES)
def test_drawings_are_of_these_numbers(source: str, name: str) -> None:
    """The same words, and the same curves, up to the layout of another matplotlib."""
    drawn = figures.svg(name, figures.FIGURES[source][name], committed(source))
    old, new = (ElementTree.fromstring(text) for text in (svg(name), drawn))
    assert _texts(old) == _texts(new)
    for one, other in zip(_curves(old), _curves(new), strict=True):
        assert one == pytest.approx(other, abs=3)


def _texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]


def _curves(root: ElementTree.Element) -> list[list[float]]:
    paths = (re.findall(r"-?\d[\d.e-]*", element.get("d", "")) for element in root.iter())
    return [[float(number) for number in path] for path in paths if len(path) > 20]


@pytest.mark.parametrize(("source", "name"), NAMES)
def test_drawings_can_be_part_of_a_page(source: str, name: str) -> None:
    text = svg(name)
    root = ElementTree.fromstring(text)
    assert len(text) < 60_000
    assert "metadata" not in text
    assert "<style" not in text
    assert not re.search(r"(?:fill|stroke): #", text)  # colours are the page's
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(rf"{name}-\d+", own) for own in ids)
    assert set(re.findall(r"(?:href=.|url\()#([\w-]+)", text)) == set(ids)


@pytest.mark.parametrize(("source", "name"), NAMES)
def test_drawings_are_on_a_page_with_words_for_who_cannot_see_them(source: str, name: str) -> None:
    figure = re.compile(rf"\.\. figure:: _static/figures/{name}\.svg\n +:alt: (.+(?:\n {{6}}.+)*)")
    alt, *others = [alt for page in DOCS.glob("*.md") for alt in figure.findall(read(page))]
    assert not others
    assert len(alt) > 40


def test_nothing_else_is_there() -> None:
    names = {f"{name}.svg" for _, name in NAMES} | {f"{source}.json" for source in figures.SOURCES}
    assert {path.name for path in FOLDER.iterdir()} == names | {"quick_start.txt"}


def test_pages_tell_what_the_figures_show() -> None:
    how, start = (read(DOCS / f"{name}.md") for name in ("how-it-works", "quick-start"))
    points = committed("dual")["points"]
    assert points["closed_form"]["primal"] > points["exact"]["primal"]
    assert points["exact"]["primal"] == pytest.approx(points["exact"]["dual"])
    for point in points.values():
        for number in (point["gamma"], point["primal"]):
            assert f"{number:.3f}" in how

    ternary = committed("ternary")
    for zone in ternary["zones"].values():
        assert zone["factor"] == pytest.approx(abs(zone["level"]) or ternary["unit"], rel=1e-4)
        assert str(zone["weights"]) in how
        assert f"{zone['factor']:.2f}" in how

    runs = [quick_start.Run(**run) for run in committed("quick_start")["runs"]]
    assert read(FOLDER / "quick_start.txt") == f"{quick_start.report(runs)}\n"
    for run in runs:
        assert f"{run.bytes:,}" in start
    sizes = {name: p.numel() for name, p in quick_start.make_net().named_parameters()}
    quantized = sizes["3.weight"] + sizes["6.weight"]
    assert f"{quantized:,} of the network's {sum(sizes.values()):,}" in " ".join(start.split())


def test_the_quick_start_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        quick_start.main(["--out", str(tmp_path)])
    _, *rows, last = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in last
    for name in quick_start.FIGURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000

    shown = committed("quick_start")["runs"]
    for row, run in zip(rows, shown, strict=True):
        name, accuracy, first, final, size = row.split()
        assert name == run["name"]
        assert float(accuracy.rstrip("%")) == pytest.approx(100 * run["accuracy"], abs=4)
        # Early steps differ by rounding only; if not, python docs/figures.py quick_start.
        assert float(first) == pytest.approx(quick_start.means(run["gammas"], 30)[0], abs=0.05)
        assert 0 <= float(final) < 1
        assert size == f"{run['bytes']:,}"
        net = load_packed(quick_start.make_net(), tmp_path / f"{name}.dfw")
        assert f"{quick_start.accuracy(net):.1%}" == accuracy


def test_stale_numbers_are_noticed(tmp_path: Path) -> None:
    data = committed("step")
    data["near"][3] *= 1.01
    with pytest.raises(AssertionError, match="near"):
        assert_close(figures.rounded(figures.step_data()), data)
    shutil.copytree(FOLDER, tmp_path / "figures")
    figures.write("step", tmp_path / "figures")
    assert read(tmp_path / "figures" / "step.json") == figures.as_json(committed("step"))

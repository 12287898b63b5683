"""The pages show what the runs in docs/runs say, and a finished run is added as it was."""

import importlib.util
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _results() -> Any:
    spec = importlib.util.spec_from_file_location("docs_results", DOCS / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_results"] = module  # where dataclasses look for the module of their class
    spec.loader.exec_module(module)
    return module


results = _results()
PAGE = "\n".join(path.read_text(encoding="utf-8") for path in results.PAGES)


def test_the_pages_are_up_to_date() -> None:
    assert results.fill(PAGE) == PAGE, "run: python docs/results.py"
    for name in results.TABLES:
        assert PAGE.count(f"<!-- table: {name} -->") == 1, name


def test_another_number_in_the_runs_is_another_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in results.RUNS.glob("*.csv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / path.name).write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(results, "RUNS", tmp_path)
    assert results.fill(PAGE) == PAGE
    run = next(r for r in results.load("main") if r["net"] == "float" and r["loss"] == "ce")
    accuracy = f"{run.rows[-1]['accuracy']:.5g}"
    text = (tmp_path / "main.csv").read_text(encoding="utf-8")
    (tmp_path / "main.csv").write_text(text.replace(f",{accuracy},", ",0.1234,"), encoding="utf-8")
    assert "12.3" in results.fill(PAGE)


@pytest.mark.parametrize("name", sorted(path.stem for path in results.RUNS.glob("*.csv")))
def test_runs_are_whole(name: str) -> None:
    for run in results.load(name):
        assert float(run["lr"]) > 0
        if name == "chars":
            assert run.rows[-1]["step"] == int(run["steps"])
            assert math.isfinite(run.rows[-1]["val_loss"])
        else:
            assert [row["epoch"] for row in run.rows] == [*range(1, int(run["epochs"]) + 1)]
            assert 0 <= run.accuracy <= 100
        # Only runs with all images are judged on the test images.
        if name not in ("main", "long", "parq", "chars"):
            assert run["validate"] == "yes"


def test_decades() -> None:
    # Half a decade apart; within 2 points of 50 between 49 and 46 a third of the way down.
    points = {0.01: 40.0, 0.1: 50.0, 1.0: 49.0, 10.0: 46.0}
    assert results.decades(points, 2) == pytest.approx(0.2 + 1 + 1 / 3)


def test_a_finished_run_is_added_with_the_arguments_that_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cifar_resnet20
    from resnet20.settings import Settings

    parser = cifar_resnet20.parser()
    job = "--net xnor --optimizer dfw --lr 0.3 --epochs 1 --limit 64 --validate --no-smooth"
    out = tmp_path / "run"
    assert cifar_resnet20.main([*shlex.split(job), "--threads", "1", "--out", str(out)]) == 0
    monkeypatch.setattr(results, "RUNS", tmp_path)
    results.add("tried", [out])
    results.add("tried", [out])  # which replaces it
    (run,) = results.load("tried")
    assert run.optimizer == "DFW"
    given = Settings.choose(vars(parser.parse_args(shlex.split(job))))
    again = Settings.choose(vars(parser.parse_args(shlex.split(run.arguments))))
    for name in ("net", "optimizer", "lr", "epochs", "limit", "validate", "schedule", "average"):
        assert getattr(again, name) == getattr(given, name), name
    assert run.accuracy == pytest.approx(100 * run.rows[-1]["average_accuracy"])

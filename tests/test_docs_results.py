"""The results page shows what its runs say, and its commands are commands of the examples."""

import csv
import importlib.util
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import char_transformer
import cifar_resnet20
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def _results() -> Any:
    spec = importlib.util.spec_from_file_location("docs_results", DOCS / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_results"] = module  # where dataclasses look for the module of their class
    spec.loader.exec_module(module)
    return module


results = _results()
PAGES = [path.read_text(encoding="utf-8") for path in results.PAGES]
PAGE = "\n".join(PAGES)
CSVS = sorted(path.stem for path in (DOCS / "runs").glob("*.csv"))


def test_the_pages_are_up_to_date() -> None:
    assert results.fill(PAGE) == PAGE, "run: python docs/results.py"


def test_the_pages_have_every_table() -> None:
    for name in results.TABLES:
        assert PAGE.count(f"<!-- table: {name} -->") == 1, name


def test_another_number_in_the_runs_is_another_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (DOCS / "runs").glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(results, "RUNS", tmp_path)
    assert results.fill(PAGE) == PAGE
    with (tmp_path / "main.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    last = max(
        (row for row in rows if row["run"].startswith("--net xnor --optimizer dfw")),
        key=lambda row: int(row["epoch"]),
    )
    last["accuracy"] = "0.1234"
    with (tmp_path / "main.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert "12.3" in results.fill(PAGE)


@pytest.mark.parametrize("name", CSVS)
def test_runs_are_whole_and_their_arguments_can_be_given(name: str) -> None:
    parser = (char_transformer if name == "chars" else cifar_resnet20).parser()
    for run in results.load(name):
        given = vars(parser.parse_args(shlex.split(run.arguments)))
        assert given["lr"] == run.lr
        if name == "chars":
            assert run.rows[-1]["step"] == given["steps"]
            assert math.isfinite(run.rows[-1]["val_loss"])
        else:
            epochs = [row["epoch"] for row in run.rows]
            assert epochs == list(range(1, given["epochs"] + 1))
            assert 0 <= run.rows[-1]["accuracy"] <= 1


@pytest.mark.parametrize("name", ["main", "long", "architectures", "float_first", "relaxed"])
def test_each_row_of_a_table_had_the_same_budget(name: str) -> None:
    budgets = {
        (run["epochs"], run["schedule"], run["seed"], run["limit"], run["validate"])
        for run in results.load(name)
        if run["seed"] == "0"
    }
    assert len(budgets) == 1
    (*_, limit, validate) = budgets.pop()
    small = name in ("architectures", "float_first", "relaxed")
    assert bool(limit) == bool(validate) == small  # else the test images


@pytest.mark.parametrize("name", ["main", "long", "architectures", "float_first"])
def test_learning_rates_of_a_table_are_the_best_of_the_sweep(name: str) -> None:
    swept = results.load("sweep")
    for run in results.load(name):
        if run["shortcut"]:
            continue  # which were not swept
        same = [
            other
            for other in swept
            if all(other[key] == run[key] for key in ("net", "optimizer", "loss"))
        ]
        assert max(same, key=lambda other: float(other.accuracy)).lr == run.lr, run.arguments
        assert all(other["validate"] for other in same)  # tuned on training images


def test_plateau() -> None:
    # Half a decade apart; within 2 points of 50 between 49 and 47 a third of the way down.
    points = {0.01: 40.0, 0.1: 50.0, 1.0: 49.0, 10.0: 46.0}
    low, high = results.plateau(points, 2)
    assert math.log10(low) == pytest.approx(-1 - 0.2)
    assert math.log10(high) == pytest.approx(0 + 1 / 3)
    assert results.decades(points, 2) == pytest.approx(1 + 0.2 + 1 / 3)
    assert results.plateau({0.1: 10.0, 1.0: 50.0}, 2) == (pytest.approx(10**-0.05), 1.0)


def test_a_finished_run_is_added_with_the_arguments_that_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from resnet20.settings import Settings
    from resnet20.training import train

    job = ["--net", "xnor", "--optimizer", "dfw", "--lr", "0.3", "--epochs", "2", "--limit", "64"]
    job += ["--no-smooth", "--radius", "0.5", "--average", "0.9", "--validate"]
    settings = Settings.choose(vars(cifar_resnet20.parser().parse_args(job)) | {"threads": 1})
    out = tmp_path / "run"
    history = train(settings, cifar_resnet20._load(settings, False), out, False).history
    monkeypatch.setattr(results, "RUNS", tmp_path)
    results.add("tried", [out])
    results.add("tried", [out])  # which replaces it
    (run,) = results.load("tried")
    again = Settings.choose(vars(cifar_resnet20.parser().parse_args(shlex.split(run.arguments))))
    assert again.to_dict() | {"threads": 1} == settings.to_dict()
    assert run.accuracy == pytest.approx(100 * history[-1]["held_out_accuracy"], rel=1e-4)
    assert run.average == pytest.approx(100 * history[-1]["average_accuracy"], rel=1e-4)
    assert [row["flip_rate"] for row in run.rows] == pytest.approx(
        [row["flip_rate"] for row in history], rel=1e-4
    )


def test_an_unfinished_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet20 import checkpoint
    from resnet20.settings import Settings
    from resnet20.training import Run

    settings = Settings.choose({"net": "float", "epochs": 2, "limit": 64, "threads": 1})
    run = Run(settings, cifar_resnet20._load(settings, False))
    run.train_epoch()
    checkpoint.save(tmp_path, run.state_dict())
    monkeypatch.setattr(results, "RUNS", tmp_path)
    with pytest.raises(SystemExit, match="is not finished; resume it first"):
        results.add("tried", [tmp_path])
    assert not (tmp_path / "tried.csv").exists()

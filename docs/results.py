"""Fill the tables of results.md from the runs they rest on: python docs/results.py

The runs are in docs/runs, a CSV for each table: every epoch of every run, and the arguments that
the run was started with. A finished run is added from the folder that it left behind:

    python docs/results.py --add sweep runs/xnor-dfw runs/xnor-adam

tests/test_docs_results.py checks that the page shows what the runs say.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "results.md"
RUNS = DOCS / "runs"

NETS = ("float", "binary", "ternary", "xnor")
OPTIMIZERS = ("dfw", "adam", "sgd")
NAMES = {
    "float": "float",
    "binary": "binary weights",
    "ternary": "ternary weights",
    "xnor": "XNOR",
    "dfw": "DFW",
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "parq": "PARQ",
    "svm": "SVM",
    "ce": "cross-entropy",
    "wrn16-2": "WRN-16-2",
    "densenet28": "DenseNet-BC-28-12",
    "resnet20": "ResNet-20",
}


# ---- The runs ----


@dataclass(frozen=True)
class Run:
    """One run: what it was started with, and a dictionary of numbers for each epoch."""

    arguments: str
    rows: tuple[dict[str, float], ...]

    def __getitem__(self, option: str) -> str:
        """The value of ``--option``; "yes" if it takes none, "" if it is not there."""
        words = shlex.split(self.arguments)
        if f"--{option}" not in words:
            return ""
        after = words[words.index(f"--{option}") + 1 :]
        return after[0] if after and not after[0].startswith("--") else "yes"

    @property
    def lr(self) -> float:
        return float(self["lr"])

    @property
    def accuracy(self) -> float:
        """After the last epoch, in percent."""
        return 100 * self.rows[-1]["accuracy"]

    @property
    def average_accuracy(self) -> float:
        """Of the average of the weights, after the last epoch, in percent."""
        return 100 * self.rows[-1]["average_accuracy"]


def load(table: str) -> list[Run]:
    """The runs of ``docs/runs/TABLE.csv``."""
    runs: dict[str, list[dict[str, float]]] = {}
    with (RUNS / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value or "nan") for key, value in row.items() if key != "run"}
            runs.setdefault(row["run"], []).append(numbers)
    return [Run(arguments, tuple(rows)) for arguments, rows in runs.items()]


def add(table: str, folders: Iterable[Path]) -> None:
    """Add finished runs to a table; one with the same arguments is replaced."""
    path = RUNS / f"{table}.csv"
    runs = {run.arguments: run for run in load(table)} if path.exists() else {}
    for folder in folders:
        run = _finished(folder)
        runs[run.arguments] = run
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = list(dict.fromkeys(key for run in runs.values() for row in run.rows for key in row))
    writer.writerow(["run", *columns])
    for arguments in sorted(runs):
        for row in runs[arguments].rows:
            cells = (row.get(column, math.nan) for column in columns)
            writer.writerow([arguments, *("" if math.isnan(x) else f"{x:.5g}" for x in cells)])
    path.write_text(text.getvalue(), encoding="utf-8")


def _finished(folder: Path) -> Run:
    sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "examples")]
    from resnet20 import checkpoint

    stored = checkpoint.load(folder)
    settings = stored["settings"]
    total = settings["epochs"] if "epochs" in settings else settings["steps"]
    rows = [
        {key.removeprefix("held_out_"): float(value) for key, value in row.items()}
        for row in stored["history"]
    ]
    if rows[-1].get("epoch", rows[-1].get("step")) != total:
        raise SystemExit(f"{folder} is not finished; resume it first")
    return Run(_arguments(settings), tuple(rows))


def _arguments(settings: dict[str, Any]) -> str:
    # What decides the weights; where they were computed is told on the page.
    from chars.settings import Settings as Chars
    from resnet20.settings import Settings as Images
    from resnet20.settings import option

    always = ["net", "optimizer", "loss", "lr", "epochs", "steps", "schedule", "seed"]
    given = {key: settings[key] for key in always if key in settings}
    known = Images if "epochs" in settings else Chars
    place = {"data": "-", "device": "cpu"} if "epochs" in settings else {}
    defaults = known.choose(given | place).to_dict()
    for key, value in settings.items():
        if key not in ("data", "device", "threads", "amp") and value != defaults[key]:
            given[key] = value
    words = []
    for key, value in given.items():
        if isinstance(value, bool):
            words.append(option(key) if value else option(f"no_{key}"))
        else:
            words += [option(key), f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


# ---- Tables ----

Cells = Sequence[str]


def table(header: Cells, rows: Iterable[Cells]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def number(value: float) -> str:
    """An accuracy in percent, or nothing."""
    return "" if math.isnan(value) else f"{value:.1f}"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def pick(runs: Iterable[Run], **options: str) -> list[Run]:
    """The runs with these options."""
    return [
        run
        for run in runs
        if all(run[key.replace("_", "-")] == value for key, value in options.items())
    ]


def lrs(runs: Iterable[Run]) -> list[float]:
    return sorted({run.lr for run in runs})


def plateau(points: dict[float, float], within: float = 2.0) -> tuple[float, float]:
    """Where accuracy, by lr, is within so many points of the best: from lr to lr.

    Between two values of lr it is taken to be linear in log lr, and beyond the ends it is unknown.
    """
    xs = sorted(points)
    best = max(xs, key=lambda x: points[x])
    level = points[best] - within

    def reach(side: list[float]) -> float:
        near = best
        for far in side:
            if points[far] < level:
                share = (points[near] - level) / (points[near] - points[far])
                return float(near * (far / near) ** share)
            near = far
        return near

    at = xs.index(best)
    return reach(xs[:at][::-1]), reach(xs[at + 1 :])


def sweep() -> dict[tuple[str, str], dict[float, float]]:
    """Accuracy by lr, of every net and optimizer."""
    runs = load("sweep")
    return {
        (net, optimizer): {run.lr: run.accuracy for run in pick(runs, net=net, optimizer=optimizer)}
        for net in NETS
        for optimizer in OPTIMIZERS
    }

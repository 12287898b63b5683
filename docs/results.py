"""Fill the tables of these pages and the README from their runs: python docs/results.py

The runs are in docs/runs, a CSV for each table: every epoch of every run, and the arguments that
the run was started with. A finished run is added from the folder that it left behind:

    python docs/results.py --add main runs/xnor-dfw runs/xnor-adam

Without a schedule, what a run is after some of its epochs is what a shorter run would be: with
--epochs so many are taken, also of a run that goes on.

tests/test_docs_results.py checks that the pages show what the runs say.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGES = (DOCS / "results.md", DOCS / "design-notes.md", DOCS.parent / "README.md")
RUNS = DOCS / "runs"

NETS = ("float", "binary", "ternary", "xnor")
SWEPT = ("DFW", "Euclidean DFW", "Adam", "SGD", "Muon")
ARCHES = ("wrn16-2", "densenet28")
NAMES = {
    "float": "float",
    "binary": "binary weights",
    "ternary": "ternary weights",
    "xnor": "XNOR",
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "muon": "Muon",
    "parq": "PARQ",
    "bireal": "XNOR, Bi-Real",
    "wrn16-2": "WRN-16-2",
    "densenet28": "DenseNet-BC-28-12",
    "svm": "SVM",
    "ce": "cross-entropy",
}
TIME = 1.11  # of an epoch of DFW, in those of SGD and Adam, measured side by side
SCHEDULES = {"cosine": "", "none": "average"}


# ---- The runs ----


@dataclass(frozen=True)
class Run:
    """One run: what it was started with, and a dictionary of numbers for each epoch."""

    arguments: str
    rows: tuple[dict[str, float], ...]

    def __getitem__(self, option: str) -> str:
        """The value of ``--option``; "yes" if it takes none, "" if it is not there."""
        words = self.arguments.split()
        if f"--{option}" not in words:
            return ""
        after = words[words.index(f"--{option}") + 1 :]
        return after[0] if after and not after[0].startswith("--") else "yes"

    @property
    def optimizer(self) -> str:
        """Its name; runs of DFW from before there was a choice of norm are Euclidean."""
        if self["optimizer"] == "dfw":
            return "DFW" if self["norm"] == "spectral" else "Euclidean DFW"
        return NAMES[self["optimizer"]]

    @property
    def who(self) -> str:
        """Optimizer, and loss and schedule where they are not the usual ones."""
        loss = "SVM" * (self.optimizer == "DFW" and self["loss"] == "svm")
        return ", ".join(filter(None, (self.optimizer, loss, SCHEDULES[self["schedule"]])))

    @property
    def start(self) -> str:
        """How its weights began, if they were not quantized from the first step on."""
        return "relaxed" if self["relax"] else "float first" if self["float-epochs"] else ""

    @property
    def accuracies(self) -> list[float]:
        """After each epoch, in percent; of the average where that is what was judged."""
        judged = "average_accuracy" if self["average"] == "yes" else "accuracy"
        return [100 * row[judged] for row in self.rows]

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1]


def load(table: str) -> list[Run]:
    """The runs of ``docs/runs/TABLE.csv``."""
    runs: dict[str, list[dict[str, float]]] = {}
    with (RUNS / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value or "nan") for key, value in row.items() if key != "run"}
            runs.setdefault(row["run"], []).append(numbers)
    return [Run(arguments, tuple(rows)) for arguments, rows in runs.items()]


def add(table: str, folders: Iterable[Path], epochs: int | None = None) -> None:
    """Add finished runs to a table; one with the same arguments is replaced."""
    path = RUNS / f"{table}.csv"
    runs = {run.arguments: run for run in load(table)} if path.exists() else {}
    for folder in folders:
        run = _finished(folder, epochs)
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


def _finished(folder: Path, epochs: int | None) -> Run:
    sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "examples")]
    from common import load_checkpoint

    stored = load_checkpoint(folder)
    settings = stored["settings"]
    rows = [
        {re.sub("^(test|validation)_", "", key): float(value) for key, value in row.items()}
        for row in stored["history"]
    ]
    unit = "epoch" if "epochs" in settings else "step"
    if epochs is not None and settings["schedule"] == "none":
        settings, rows = settings | {"epochs": epochs}, rows[:epochs]
    if not rows or rows[-1][unit] != settings[f"{unit}s"]:
        raise SystemExit(f"{folder} is not finished; resume it first")
    return Run(_arguments(settings), tuple(rows))


def _arguments(settings: dict[str, Any]) -> str:
    """What decides the weights, as options; where they were computed is told on the page."""
    if settings["optimizer"] == "dfw":
        settings = settings | {"norm": settings.get("norm") or "spectral"}
    words = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        as_usual = value in (None, "resnet", "resnet20", "bf16")
        if as_usual or key in ("data", "device", "threads"):  # which decide nothing
            continue
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        else:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return " ".join(words)


def pick(runs: Iterable[Run], **options: str) -> list[Run]:
    """The runs with these options; an empty value stands for one that is not given."""
    return [run for run in runs if all(run[k.replace("_", "-")] == v for k, v in options.items())]


def by_lr(run: Run) -> float:
    return float(run["lr"])


# ---- The tables ----

Cells = Sequence[str]


def markdown(header: Cells, rows: Iterable[Cells]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(values: Sequence[float]) -> str:
    """The mean in percent, and what it is the mean of."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{x:.1f}' for x in values)})"


def mean(runs: Sequence[Run]) -> float:
    return sum(run.accuracy for run in runs) / len(runs)


def usual(runs: Iterable[Run]) -> list[Run]:
    """Without baselines whose loss or schedule is not what suits them, and other starts."""
    return [
        run
        for run in runs
        if not run.start
        and run["schedule"] != "parq"
        and (run["loss"] == "ce" or run["optimizer"] == "dfw")
    ]


def all_images(epochs: str) -> list[Run]:
    """The usual runs of so many epochs with all training images."""
    return usual(pick([*load("main"), *load("long"), *load("parq")], epochs=epochs))


def as_used(epochs: str) -> list[Run]:
    """All seeds of each optimizer of a net; DFW with its defaults: cross-entropy, no schedule."""
    return [
        run
        for run in pick(all_images(epochs), shortcut="")
        if run.optimizer != "DFW" or (run["schedule"], run["loss"]) == ("none", "ce")
    ]


def accuracy_table() -> str:
    """A row for every optimizer of a net, a column for each budget; the best of a net is bold."""
    few = "10,000 images, 5 epochs"
    budgets = {
        few: usual(load("sweep")),
        "all, 5 epochs": all_images("5"),
        "all, 30 epochs": all_images("30"),
    }
    nets: dict[str, dict[tuple[str, str], dict[str, list[float]]]] = {}
    for budget, runs in budgets.items():
        for run in runs:
            kinds = nets.setdefault(run["shortcut"] or run["net"], {})
            cells = kinds.setdefault((run.who, run["lr"]), {})
            cells.setdefault(budget, []).append(run.accuracy)
    rows = []
    for net in filter(nets.get, (*NETS, "bireal")):
        # Of the sweep, which has a table of its own, what was run with more images, and averages.
        shown = {
            kind: cells
            for kind, cells in nets[net].items()
            if cells.keys() != {few}
            or kind[0] in ("Adam, average", "Muon, average", "SGD, average")
        }
        means = {(kind, b): fmean(x) for kind, cells in shown.items() for b, x in cells.items()}
        best = {b: max(means[key] for key in means if key[1] == b) for _, b in means}
        for kind, cells in sorted(shown.items()):
            found = []
            for budget in budgets:
                bold = "**" * (budget in cells and means[kind, budget] == best[budget])
                found.append(f"{bold}{number(cells.get(budget, []))}{bold}")
            rows.append([NAMES[net], *kind, *found])
    return markdown(["net", "optimizer", "lr", *budgets], rows)


def readme_table() -> str:
    """For a first look: five epochs, each optimizer at its best; the mean of its seeds."""
    runs = as_used("5")
    names = ("DFW", "Euclidean DFW", "Adam", "SGD", "Muon", "PARQ")
    rows = []
    for net in NETS:
        kinds: dict[str, dict[str, list[Run]]] = {}
        for run in pick(runs, net=net):
            how = f"{run['lr']} {run['schedule']}"
            kinds.setdefault(run.optimizer, {}).setdefault(how, []).append(run)
        best = {who: max(map(mean, tried.values())) for who, tried in kinds.items()}
        cells = [f"{best[n]:.1f}" if n in best else "" for n in names]
        rows.append(
            [NAMES[net], *(f"**{c}**" if c == f"{max(best.values()):.1f}" else c for c in cells)]
        )
    return markdown(["net", *names], rows)


def sweep() -> dict[tuple[str, str], dict[float, float]]:
    """Accuracy by lr, for every net and optimizer; DFW without a schedule, the others with one."""
    points: dict[tuple[str, str], dict[float, float]] = {}
    for net, who in itertools.product(NETS, SWEPT):
        loss = "svm" if who.endswith("DFW") else "ce"
        schedule = "none" if who == "DFW" else "cosine"
        tried = pick(load("sweep"), net=net, loss=loss, schedule=schedule, seed="0")
        chosen = sorted((run for run in tried if run.optimizer == who), key=by_lr)
        points[net, who] = {by_lr(run): run.accuracy for run in chosen}
    return points


def sweep_table() -> str:
    """The best accuracy and its lr, and the decades around it that are within 2 and 10 points."""
    rows, swept = [], sweep()
    for net in NETS:
        cells = [NAMES[net]]
        for who in SWEPT:
            points = swept[net, who]
            best = max(points, key=points.__getitem__)
            widths = ", ".join(f"{decades(points, within):.1f}" for within in (2, 10))
            cells.append(f"{points[best]:.1f} at {best:g} ({widths})")
        rows.append(cells)
    return markdown(["net", *SWEPT], rows)


def reached(run: Run, level: float) -> tuple[str, str]:
    """The epoch from which a run of DFW is at a level for good, and that as a share of the time."""
    there = max((i for i, x in enumerate(run.accuracies, 1) if x < level), default=0) + 1
    return (f"{there}", f"{TIME * there / 30:.2f}") if there <= len(run.rows) else ("not in 30", "")


def reach_table() -> str:
    """After how many epochs DFW is, for good, where another optimizer ends after thirty."""
    runs, rows = as_used("30"), []
    others = [run for run in pick(runs, seed="0") if run["optimizer"] != "dfw"]
    for net in NETS:
        of_dfw = pick(runs, net=net, norm="spectral")
        for other in sorted(pick(others, net=net), key=lambda run: run.accuracy):
            seeds = [reached(run, other.accuracy) for run in of_dfw]
            times = [", ".join(filter(None, column)) for column in zip(*seeds, strict=True)]
            rows.append([NAMES[net], other.who, f"{other.accuracy:.1f}", *times])
    header = ["net", "optimizer", "its accuracy after 30 epochs, %", "DFW is above from epoch"]
    return markdown([*header, "share of the time"], rows)


def longest(run: Run, epoch: float) -> float:
    """The longest step allowed in the middle of an epoch, relative to the size of the weights."""
    steps = 50_000 // int(run["batch-size"])
    return by_lr(run) / math.sqrt(1 + (epoch - 0.5) * steps / 100)


def gamma_table() -> str:
    """γ, and the length of a step in percent, in long runs with the SVM loss, means of epochs."""
    options = {"norm": "spectral", "loss": "svm", "schedule": "none", "seed": "0", "shortcut": ""}
    runs = pick(all_images("30"), **options)
    rows, epochs = [], (1, 2, 5, 10, 20, 30)
    for run in sorted(runs, key=lambda run: NETS.index(run["net"])):
        gammas = [(run.rows[i - 1]["gamma_mean"], longest(run, i)) for i in epochs]
        rows.append([NAMES[run["net"]], *(f"{g:.2f}; {100 * g * of:.2f}" for g, of in gammas)])
    return markdown(["net", *(f"epoch {i}" for i in epochs)], rows)


def decades(points: dict[float, float], within: float) -> float:
    """How wide the plateau about the best lr is on which accuracy is within so many points.

    Between two values of lr that were tried, accuracy is taken to be linear in log lr.
    """
    tried = sorted(points)
    best = max(tried, key=points.__getitem__)
    level, at = points[best] - within, tried.index(best)

    def reach(side: list[float]) -> float:
        near = best
        for far in side:
            if points[far] < level:
                share = (points[near] - level) / (points[near] - points[far])
                return near * float((far / near) ** share)
            near = far
        return near

    return math.log10(reach(tried[at + 1 :]) / reach(tried[:at][::-1]))


VARIANTS: list[tuple[str, dict[str, str]]] = [
    ("as it is", {}),
    ("closed form, then clipped", {"step_size": "closed_form"}),
    ("radius 0.5", {"radius": "0.5"}),
    ("radius 2", {"radius": "2"}),
    ("momentum 0", {"momentum": "0"}),
    ("momentum 0.8", {"momentum": "0.8"}),
    ("momentum 0.95", {"momentum": "0.95"}),
    ("smoothed SVM loss", {"loss": "svm"}),
    ("SVM loss, not smoothed", {"loss": "svm", "no_smooth": "yes"}),
    ("cross-entropy", {"loss": "ce"}),
    ("no schedule", {"schedule": "none"}),
]


def ablation_table() -> str:
    """One change at a time to DFW in both norms, each as it is used."""
    runs = [*load("ablations"), *pick(load("sweep"), norm="spectral", lr="0.07")]
    settings = {
        "Euclidean DFW": {"loss": "svm", "schedule": "cosine", "average": ""},
        "DFW": {"loss": "ce", "schedule": "none", "average": "yes"},
    }
    columns: dict[tuple[str, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (NETS.index(run["net"]), by_lr(run))):
        if run["net"] in ("ternary", "xnor"):
            columns.setdefault((run["net"], run.optimizer, run["lr"]), []).append(run)
    changeable = ("step_size", "radius", "momentum", "no_smooth")
    rows = []
    for name, changed in VARIANTS:
        cells = [name]
        for (_, who, _), tried in columns.items():
            usual = dict.fromkeys(changeable, "") | settings[who]
            same = bool(changed) and usual | changed == usual
            chosen = [] if same else pick(tried, **(usual | changed))
            cells.append(number([run.accuracy for run in chosen]))
        if any(cells[1:]):
            rows.append(cells)
    return markdown(["", *(f"{NAMES[net]}, {who}, lr {lr}" for net, who, lr in columns)], rows)


def relaxed_table() -> str:
    """Accuracy by the share of the run after which the weights are quantized."""
    runs = pick(load("relaxed"), seed="0")
    shares = sorted({run["relax"] for run in runs}, key=float)
    rows = []
    for net, lr in sorted({(run["net"], run["lr"]) for run in runs}):
        options = {"net": net, "optimizer": "dfw", "norm": "", "loss": "svm", "lr": lr, "seed": "0"}
        both = [*pick(load("sweep"), **options), *pick(runs, **options)]
        found = {run["relax"]: f"{run.accuracy:.1f}" for run in both}
        rows.append([NAMES[net], lr, *(found.get(share, "") for share in ("", *shares))])
    return markdown(["net", "lr", "0", *shares], rows)


def architectures_table() -> str:
    """Float and ternary weights in other networks than ResNet-20."""
    runs, rows = load("architectures"), []
    names = sorted({run.optimizer for run in runs})
    for arch, net in itertools.product(ARCHES, ("float", "ternary")):
        found = {run.optimizer: run for run in pick(runs, arch=arch, net=net)}
        best = max(run.accuracy for run in found.values())
        cells = [NAMES[arch], NAMES[net]]
        for run in map(found.get, names):
            bold = "**" * (run is not None and run.accuracy == best)
            cells.append(f"{bold}{run.accuracy:.1f}{bold} ({run['lr']})" if run else "")
        rows.append(cells)
    return markdown(["network", "weights", *(f"{name} (lr)" for name in names)], rows)


def chars_table() -> str:
    """The character transformer: DFW at each lr, the others at the best that was tried."""
    kinds: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = {}
    for run in sorted(load("chars"), key=lambda run: (run["net"], run.optimizer, by_lr(run))):
        rates = (run["lr"], run["attention-lr"] or run["lr"])
        judged = "average_loss" if run["average"] == "yes" else "val_loss"
        own = (run["lr"],) if run.optimizer == "DFW" else ()
        tried = kinds.setdefault((NAMES[run["net"]], run.who, *own), {})
        tried.setdefault(rates, []).append(run.rows[-1][judged])
    rows = []
    for kind, tried in kinds.items():
        lr, of_heads = best = min(tried, key=lambda rates: sum(tried[rates]) / len(tried[rates]))
        lr += f" (Q, K: {of_heads})" * (of_heads != lr) + f", of {len(tried)}" * (len(tried) > 1)
        rows.append([*kind[:2], lr, ", ".join(f"{x:.3f}" for x in tried[best])])
    return markdown(["weights", "optimizer", "lr", "validation loss"], rows)


# ---- The pages ----

TABLES: dict[str, Callable[[], str]] = {
    "readme": readme_table,
    "accuracy": accuracy_table,
    "sweep": sweep_table,
    "reach": reach_table,
    "gamma": gamma_table,
    "ablations": ablation_table,
    "relaxed": relaxed_table,
    "architectures": architectures_table,
    "chars": chars_table,
}
"""What stands between the marks on the pages, by their names."""


def fill(page: str) -> str:
    """The page with all its tables as the runs have them."""

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[4]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n(.*?)\n?(<!-- end -->)", filled, page, flags=re.S)


def main() -> None:
    """Fill the pages, or add runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--add", metavar="TABLE", help="add runs to docs/runs/TABLE.csv first")
    parser.add_argument("folders", nargs="*", type=Path, help="that finished runs left behind")
    parser.add_argument("--epochs", type=int, help="how many of each, without a schedule")
    given = parser.parse_args()
    if given.add:
        add(given.add, given.folders, given.epochs)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

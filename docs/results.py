"""Fill the tables of results.md and the README from their runs: python docs/results.py

The runs are in docs/runs, a CSV for each table: every epoch of every run, and the arguments that
the run was started with. A finished run is added from the folder that it left behind:

    python docs/results.py --add sweep runs/xnor-dfw runs/xnor-adam

tests/test_docs_results.py checks that the page shows what the runs say.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGES = (DOCS / "results.md", DOCS.parent / "README.md")
RUNS = DOCS / "runs"

NETS = ("float", "binary", "ternary", "xnor")
OPTIMIZERS = ("dfw", "adam", "sgd")
LOSSES = ("svm", "ce")
SHORTCUTS = ("", "bireal")
ARCHES = ("wrn16-2", "densenet28")
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
    "bireal": "Bi-Real shortcuts",
    "wrn16-2": "WRN-16-2",
    "densenet28": "DenseNet-BC-28-12",
    "svm": "SVM",
    "ce": "cross-entropy",
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
    def float_epochs(self) -> int:
        """How many of its epochs had float weights, before they were quantized."""
        return int(self["float-epochs"] or 0)

    @property
    def start(self) -> str:
        """How its weights began, if they were not quantized from the first step on."""
        if self["relax"]:
            return "relaxed"
        return f"float for {self.float_epochs} epochs" if self.float_epochs else ""

    @property
    def accuracy(self) -> float:
        """After the last epoch, in percent."""
        return 100 * self.rows[-1]["accuracy"]

    @property
    def average(self) -> float:
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

    always = [
        "net",
        "optimizer",
        "loss",
        "lr",
        "attention_lr",
        "epochs",
        "steps",
        "schedule",
        "seed",
    ]
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


# ---- What the tables are made of ----

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


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def pick(runs: Iterable[Run], **options: str) -> list[Run]:
    """The runs with these options; an empty value stands for one that is not given."""
    return [run for run in runs if all(run[key] == value for key, value in options.items())]


def accuracies(runs: Iterable[Run], **options: str) -> list[float]:
    return [run.accuracy for run in pick(runs, **options)]


# ---- The table ----


def mean_of(runs: list[Run], net: str, optimizer: str) -> float:
    """Over seeds, with the better of the losses that there are runs with.

    Of the plain ones: quantized from the first step on, with the usual shortcuts.
    """
    plain = [run for run in runs if not run.start]
    options = {"net": net, "optimizer": optimizer, "shortcut": ""}
    losses = [accuracies(plain, loss=loss, **options) for loss in LOSSES]
    return max(sum(values) / len(values) for values in losses if values)


def main_table() -> str:
    return rows_of(load("main"))


def long_table() -> str:
    return rows_of(load("long"))


def rows_of(runs: list[Run]) -> str:
    """A row for every kind of run, with the mean over its seeds."""
    starts = sorted({run.start for run in runs})
    kinds = itertools.product(SHORTCUTS, NETS, OPTIMIZERS, LOSSES, starts)
    rows = []
    for shortcut, net, optimizer, loss, start in kinds:
        chosen = [
            run
            for run in pick(runs, shortcut=shortcut, net=net, optimizer=optimizer, loss=loss)
            if run.start == start
        ]
        if not chosen:
            continue
        name = f"{NAMES[net]}, {NAMES[shortcut]}" if shortcut else NAMES[net]
        name += f", {start}" * bool(start)
        full_loss = "smoothed " * (optimizer == "dfw") + NAMES[loss]
        accuracy = number([run.accuracy for run in chosen])
        cells = [name, NAMES[optimizer], full_loss, f"{chosen[0].lr:g}", accuracy]
        rows.append([f"**{cell}**" for cell in cells] if optimizer == "dfw" else cells)
    return markdown(["net", "optimizer", "loss", "lr", "test accuracy, %"], rows)


def readme_table() -> str:
    """For a first look."""
    runs, rows = load("main"), []
    for net in NETS:
        values = {optimizer: mean_of(runs, net, optimizer) for optimizer in OPTIMIZERS}
        most = f"{max(values.values()):.1f}"
        cells = [f"{value:.1f}" for value in values.values()]
        rows.append([NAMES[net], *(f"**{cell}**" if cell == most else cell for cell in cells)])
    return markdown(["net", *(NAMES[optimizer] for optimizer in OPTIMIZERS)], rows)


def targets_table() -> str:
    return targets_of(load("main"))


def long_targets_table() -> str:
    return targets_of(load("long"))


YARDSTICK = "the best float row"


def targets_of(runs: list[Run]) -> str:
    """What was to be reached, next to what was, as far as there are runs to compare."""
    made = {(run["net"], run["optimizer"]) for run in pick(runs, shortcut="") if not run.start}
    means = {key: mean_of(runs, *key) for key in made}
    floats = [means[key] for key in means if key[0] == "float"]

    def best(net: str, *optimizers: str) -> float:
        found = [means[net, name] for name in optimizers if (net, name) in means]
        return max(found) if len(found) == len(optimizers) else math.nan

    compared = [
        ("xnor", "Adam", best("xnor", "adam"), "+3.0 (poster: +3.0)", 3.0),
        ("ternary", "SGD", best("ternary", "sgd"), "0.0 (poster: −1.6)", 0.0),
        ("ternary", YARDSTICK, max(floats), "−0.6", -0.6),
        ("binary", YARDSTICK, max(floats), "−1.0", -1.0),
    ]
    compared += [
        (net, "the better of Adam and SGD", best(net, "adam", "sgd"), "", math.nan) for net in NETS
    ]
    rows = []
    for net, other, theirs, target, least in compared:
        ours = {"DFW": means.get((net, "dfw"), math.nan)}
        if other == YARDSTICK:
            for run in pick(runs, net=net, optimizer="dfw", shortcut="", seed="0"):
                if run.start:
                    ours[f"DFW, {run.start},"] = run.accuracy
        for name, value in ours.items():
            gain = value - theirs
            if not math.isnan(gain):
                met = "" if math.isnan(least) else "yes" if gain >= least else "**no**"
                rows.append([f"{NAMES[net]}: {name} above {other}", target, signed(gain), met])
    return markdown(["points", "target", "measured", "met"], rows)


# ---- One learning rate ----

WITHIN = (2.0, 10.0)


def sweep() -> dict[tuple[str, str], dict[float, float]]:
    """Accuracy by lr, for every net and optimizer."""
    runs, points = load("sweep"), {}
    for net in NETS:
        for optimizer in OPTIMIZERS:
            loss = "svm" if optimizer == "dfw" else "ce"
            chosen = pick(runs, net=net, optimizer=optimizer, loss=loss, seed="0")
            points[net, optimizer] = {run.lr: run.accuracy for run in sorted(chosen, key=by_lr)}
    return points


def by_lr(run: Run) -> float:
    return run.lr


def plateau(points: dict[float, float], within: float) -> tuple[float, float]:
    """The values of lr about the best one at which accuracy is within so many points of it.

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
                return float(near * (far / near) ** share)
            near = far
        return near

    return reach(tried[:at][::-1]), reach(tried[at + 1 :])


def decades(points: dict[float, float], within: float) -> float:
    low, high = plateau(points, within)
    return math.log10(high / low)


def sweep_table() -> str:
    swept = sweep()
    tried = sorted({lr for points in swept.values() for lr in points})
    rows = []
    for (net, optimizer), points in swept.items():
        best = max(points.values())
        cells = [f"{points[lr]:.1f}" if lr in points else "" for lr in tried]
        cells = [f"**{cell}**" if cell == f"{best:.1f}" else cell for cell in cells]
        rows.append([NAMES[net], NAMES[optimizer], *cells])
    return markdown(["net", "optimizer", *(f"{lr:g}" for lr in tried)], rows)


def plateau_table() -> str:
    swept, rows = sweep(), []
    for within in WITHIN:
        for net in NETS:
            widths = [decades(swept[net, optimizer], within) for optimizer in OPTIMIZERS]
            gain = widths[0] - max(widths[1:])
            cells = []
            for optimizer, width in zip(OPTIMIZERS, widths, strict=True):
                low, high = plateau(swept[net, optimizer], within)
                cells.append(f"{width:.2f} ({low:.2g} to {high:.2g})")
            met = "yes" if gain >= 1 else "**no**"
            more = f"{gain:+.2f}".replace("-", "−")
            rows.append([f"{within:g}", NAMES[net], *cells, more, met])
    header = ["points", "net", *(NAMES[name] for name in OPTIMIZERS), "DFW's more than both"]
    return markdown([*header, "by a decade"], rows)


def svm_table() -> str:
    """The baselines' values of lr with the SVM loss."""
    runs, rows = load("sweep"), []
    for net in NETS:
        for optimizer in ("adam", "sgd"):
            chosen = sorted(pick(runs, net=net, optimizer=optimizer, loss="svm"), key=by_lr)
            best = max((run.accuracy for run in chosen), default=math.nan)
            cells = [
                f"{run.lr:g}: {'**' * (run.accuracy == best)}{run.accuracy:.1f}"
                f"{'**' * (run.accuracy == best)}"
                for run in chosen
            ]
            rows.append([NAMES[net], NAMES[optimizer], ", ".join(cells)])
    return markdown(["net", "optimizer", "accuracy at lr"], rows)


# ---- Ablations ----

VARIANTS: list[tuple[str, dict[str, str]]] = [
    ("as it is", {}),
    ("closed form, then clipped", {"step-size": "closed_form"}),
    ("radius 0.5", {"radius": "0.5"}),
    ("radius 2", {"radius": "2"}),
    ("momentum 0", {"momentum": "0"}),
    ("SVM loss, not smoothed", {"no-smooth": "yes"}),
    ("cross-entropy", {"loss": "ce"}),
    ("no schedule", {"schedule": "none"}),
]
CHANGEABLE = ("step-size", "radius", "momentum", "no-smooth", "loss", "schedule")


def ablation_table() -> str:
    runs = load("ablations")
    nets = [net for net in NETS if pick(runs, net=net)]
    rates = sorted({run["lr"] for run in runs}, key=float)
    columns = [(net, lr) for net in nets for lr in rates if pick(runs, net=net, lr=lr)]
    rows = []
    for name, changed in VARIANTS:
        options = dict.fromkeys(CHANGEABLE, "") | {"loss": "svm", "schedule": "cosine"} | changed
        cells = [
            number(accuracies(runs, net=net, lr=lr, average="", **options)) for net, lr in columns
        ]
        if any(cells):
            rows.append([name, *cells])
    return markdown(["", *(f"{NAMES[net]}, lr {lr}" for net, lr in columns)], rows)


# ---- The open problem ----


def open_table() -> str:
    """XNOR with a schedule and without, of the network and of its average."""
    runs, rows = load("open"), []
    kinds = sorted({(run["epochs"], run["limit"], run.lr) for run in runs})
    for epochs, limit, lr in kinds:
        chosen = pick(runs, epochs=epochs, limit=limit, lr=f"{lr:g}")
        images = "10,000" if limit else "50,000"
        cells = [f"{images} images, {epochs} epochs", f"{lr:g}"]
        plain = {schedule: pick(chosen, schedule=schedule) for schedule in ("cosine", "none")}
        # Runs that differ in the average alone are one run, if the same kernels made their steps.
        cells += [number(sorted({run.accuracy for run in plain[name]})) for name in plain]
        averaged = [(run["average"], run.average) for run in plain["none"] if run["average"]]
        cells.append(", ".join(f"{accuracy:.1f} ({decay})" for decay, accuracy in averaged))
        rows.append(cells)
    header = ["budget", "lr", "cosine", "no schedule", "no schedule, average (decay)"]
    return markdown(header, rows)


# ---- A peer, and another network ----


def peers_table() -> str:
    """PARQ, and DFW with the same budgets from the main tables."""
    dfw = pick([*load("main"), *load("long")], optimizer="dfw", shortcut="", seed="0")
    rows = []
    for net in ("binary", "ternary"):
        chosen = [*pick(dfw, net=net), *pick(load("parq"), net=net)]
        for run in sorted(chosen, key=_by_budget):
            name = NAMES[run["optimizer"]]
            name += f", {run.start}" * bool(run.start)
            cells = [NAMES[net], run["epochs"], name, run["schedule"], run["lr"]]
            rows.append([*cells, f"{run.accuracy:.1f}"])
    return markdown(["net", "epochs", "optimizer", "schedule", "lr", "test accuracy, %"], rows)


def _by_budget(run: Run) -> tuple[int, str, str]:
    return int(run["epochs"]), run["optimizer"], run["schedule"]


def float_first_table() -> str:
    """Accuracy by the number of epochs before the weights are quantized."""
    return by_start("float_first", "float-epochs")


def relaxed_table() -> str:
    """Accuracy by the share of the run after which the weights are quantized."""
    return by_start("relaxed", "relax")


def by_start(table: str, option: str) -> str:
    """Accuracy by the value of an option, and without it in the sweep."""
    runs = pick(load(table), seed="0")
    values = sorted({run[option] for run in runs}, key=float)
    kinds = sorted({tuple(run[key] for key in ("net", "optimizer", "loss", "lr")) for run in runs})
    kinds.sort(key=lambda kind: (NETS.index(kind[0]), OPTIMIZERS.index(kind[1])))
    rows = []
    for net, optimizer, loss, lr in kinds:
        options = {"net": net, "optimizer": optimizer, "loss": loss, "lr": lr, "seed": "0"}
        both = [*pick(load("sweep"), **options), *pick(runs, **options)]
        found = {run[option]: f"{run.accuracy:.1f}" for run in both}
        cells = [found.get(value, "") for value in ("", *values)]
        rows.append([NAMES[net], NAMES[optimizer], lr, *cells])
    return markdown(["net", "optimizer", "lr", "0", *values], rows)


def architectures_table() -> str:
    """Float and ternary weights in other networks than ResNet-20."""
    runs, rows = load("architectures"), []
    for arch, net in itertools.product(ARCHES, ("float", "ternary")):
        cells = []
        for optimizer in OPTIMIZERS:
            (run,) = pick(runs, arch=arch, net=net, optimizer=optimizer)
            cells.append(f"{run.accuracy:.1f} ({run.lr:g})")
        rows.append([NAMES[arch], NAMES[net], *cells])
    return markdown(["network", "weights", *(f"{NAMES[name]} (lr)" for name in OPTIMIZERS)], rows)


def chars_table() -> str:
    runs, rows = load("chars"), []
    for net in ("float", "ternary"):
        for optimizer in ("dfw", "adamw", "sgd"):
            for run in sorted(pick(runs, net=net, optimizer=optimizer), key=by_lr):
                cells = [NAMES[net], NAMES[optimizer], run["lr"], run["attention-lr"]]
                rows.append([*cells, run["seed"], f"{run.rows[-1]['val_loss']:.3f}"])
    return markdown(["weights", "optimizer", "lr", "of Q and K", "seed", "validation loss"], rows)


# ---- The page ----

TABLES: dict[str, Callable[[], str]] = {
    "readme": readme_table,
    "main": main_table,
    "long": long_table,
    "long_targets": long_targets_table,
    "targets": targets_table,
    "sweep": sweep_table,
    "plateau": plateau_table,
    "svm": svm_table,
    "ablations": ablation_table,
    "open": open_table,
    "parq": peers_table,
    "float_first": float_first_table,
    "relaxed": relaxed_table,
    "architectures": architectures_table,
    "chars": chars_table,
}
"""What stands between the marks on the page, by their names."""


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
    given = parser.parse_args()
    if given.add:
        add(given.add, given.folders)
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The five rows of the poster, trained under one budget."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import checkpoint, files, report
from .data import Data
from .errors import UserError
from .settings import Settings, option
from .training import Run, train

ROWS = (
    ("float", "sgd"),
    ("ternary", "sgd"),
    ("ternary", "dfw"),
    ("xnor", "adam"),
    ("xnor", "dfw"),
)
BUDGET = "table.json"
TABLE = "table.md"
FIGURE = "table.png"
# What the rows differ in is not for the command line to say.
_OF_THE_ROW = ("net", "optimizer", "lr")
_COLOURS = {"float": "black", "ternary": "tab:orange", "xnor": "tab:blue"}


def run_table(
    given: dict[str, Any], load: Callable[[Settings], Data], out: Path, resume: bool
) -> None:
    """Train the rows that are not done yet, then print and save the table and its figure."""
    for name in _OF_THE_ROW:
        if name in given:
            raise UserError(f"{option(name)} does not go with --table, whose rows choose their own")
    if resume:
        given = _budget_of(out, given)
    settings = [
        Settings.choose(given | {"net": net, "optimizer": optimizer}) for net, optimizer in ROWS
    ]
    data = load(settings[0])
    files.make_directory(out)
    files.write_text(out / BUDGET, json.dumps(given, indent=1) + "\n")
    runs = []
    for i, row in enumerate(settings, 1):
        print(f"[{i}/{len(settings)}] ", end="")
        folder = out / f"{row.net}-{row.optimizer}"
        runs.append(train(row, data, folder, resume and (folder / checkpoint.NAME).is_file()))
    text = markdown(runs)
    files.write_text(out / TABLE, text)
    report.save_figure(out / FIGURE, _figure(runs))
    print(f"\n{text}\ntable {out / TABLE}, figure {out / FIGURE}, runs in {out}", flush=True)


def markdown(runs: list[Run]) -> str:
    """The table in Markdown, with its conditions."""
    data, settings = runs[0].data, runs[0].settings
    lines = [
        f"ResNet-20 on {data.name}: {len(data.train):,} training images, {settings.epochs} epochs, "
        f"batch size {settings.batch_size}, schedule {settings.schedule}, seed {settings.seed}, "
        f"{settings.precision}. Accuracy on "
        f"{len(data.held_out):,} {data.held_out_name} images after the last epoch; seconds per "
        "epoch of training, without evaluation.",
        "",
        f"| network | optimizer | lr | loss | {data.held_out_name} accuracy, % | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        settings, last = run.settings, run.history[-1]
        seconds = sum(row["seconds"] for row in run.history) / run.epoch
        lines.append(
            f"| {settings.net} | {settings.optimizer} | {settings.lr:g} | "
            f"{settings.loss_name} | "
            f"{100 * last['held_out_accuracy']:.2f} | {seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _budget_of(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    path = out / BUDGET
    try:
        budget: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"nothing to resume: there is no {path}; leave --resume out to start"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --out") from error
    settings = Settings.choose(budget | {"net": "float", "optimizer": "sgd"})
    settings.moved(given)
    return budget | given


def _figure(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for run in runs:
        settings = run.settings
        curves.plot(
            [row["epoch"] for row in run.history],
            [100 * row["held_out_accuracy"] for row in run.history],
            color=_COLOURS[settings.net],
            linestyle="-" if settings.optimizer == "dfw" else "--",
            label=f"{settings.net} {settings.optimizer}",
        )
    curves.set_xlabel("epoch")
    curves.set_ylabel(f"{runs[0].data.held_out_name} accuracy, %")
    curves.grid(alpha=0.3)
    curves.legend()
    last = [100 * run.history[-1]["held_out_accuracy"] for run in runs]
    drawn = bars.barh(
        [f"{run.settings.net} {run.settings.optimizer}" for run in runs],
        last,
        color=[_COLOURS[run.settings.net] for run in runs],
        alpha=0.8,
    )
    bars.bar_label(drawn, fmt="%.1f", padding=3)
    bars.invert_yaxis()
    bars.set_xlim(0, 110)
    bars.set_xlabel("after the last epoch, %")
    figure.suptitle(f"ResNet-20, {runs[0].data.name}")
    return figure

"""The five rows of the poster, trained under one budget."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import checkpoint, files, report
from .data import Data
from .errors import UserError
from .settings import Settings, option
from .training import train

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
_NOT_ON_THE_POSTER = ("arch", "average", "float_epochs", "radius", "relax", "step_size")
_COLOURS = {"float": "black", "ternary": "tab:orange", "xnor": "tab:blue"}


@dataclass(frozen=True)
class Result:
    """What is kept of a row when its run is over."""

    settings: Settings
    history: list[report.Row]

    @property
    def name(self) -> str:
        return f"{self.settings.net} {self.settings.optimizer}"

    @property
    def accuracy(self) -> float:
        """After the last epoch, in percent."""
        return 100 * self.history[-1]["held_out_accuracy"]


def run_table(
    given: dict[str, Any], load: Callable[[Settings], Data], out: Path, resume: bool
) -> None:
    """Train the rows that are not done yet, then print and save the table and its figure."""
    for name in _OF_THE_ROW:
        if name in given:
            raise UserError(f"{option(name)} does not go with --table, whose rows choose their own")
    for name in _NOT_ON_THE_POSTER:
        if name in given:
            raise UserError(f"{option(name)} does not go with --table; leave it out")
    if resume:
        given = _budget_of(out, given)
    rows = [
        Settings.choose(given | {"net": net, "optimizer": optimizer}) for net, optimizer in ROWS
    ]
    data = load(rows[0])
    files.make_directory(out)
    files.clear_leftovers(out, (BUDGET, TABLE, FIGURE))
    # The precision is part of the budget, also if it followed from the hardware.
    budget = given | {"amp": rows[0].amp}
    files.write_text(out / BUDGET, json.dumps(budget, indent=1) + "\n")
    results = []
    for i, settings in enumerate(rows, 1):
        print(f"[{i}/{len(rows)}] ", end="")
        folder = out / f"{settings.net}-{settings.optimizer}"
        begun = resume and (folder / checkpoint.NAME).is_file()
        if begun:
            stored = Settings.of_checkpoint(checkpoint.load(folder)["settings"])
            settings = stored.moved(settings.to_dict())
        results.append(Result(settings, train(settings, data, folder, begun).history))
    text = markdown(results, data)
    files.write_text(out / TABLE, text)
    report.save_figure(out / FIGURE, _figure(results, data))
    print(f"\n{text}\ntable {out / TABLE}, figure {out / FIGURE}, runs in {out}", flush=True)


def markdown(results: list[Result], data: Data) -> str:
    """The table in Markdown, with its conditions."""
    settings = results[0].settings
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
    for result in results:
        settings = result.settings
        seconds = statistics.mean(row["seconds"] for row in result.history)
        lines.append(
            f"| {settings.net} | {settings.optimizer} | {settings.lr:g} | {settings.loss_name} | "
            f"{result.accuracy:.2f} | {seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _budget_of(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    path = out / BUDGET
    try:
        budget: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings.choose(budget | {"net": "float", "optimizer": "sgd"})
    except FileNotFoundError as error:
        raise UserError(
            f"nothing to resume: there is no {path}; leave --resume out to start"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --out") from error
    settings.moved(given)
    return budget | given


def _figure(results: list[Result], data: Data) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"ResNet-20, {data.name}")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for result in results:
        curves.plot(
            [row["epoch"] for row in result.history],
            [100 * row["held_out_accuracy"] for row in result.history],
            color=_COLOURS[result.settings.net],
            linestyle="-" if result.settings.optimizer == "dfw" else "--",
            label=result.name,
        )
    curves.set_xlabel("epoch")
    curves.set_ylabel(f"{data.held_out_name} accuracy, %")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.grid(alpha=0.3)
    curves.legend()
    drawn = bars.barh(
        [result.name for result in results],
        [result.accuracy for result in results],
        color=[_COLOURS[result.settings.net] for result in results],
        alpha=0.8,
    )
    bars.bar_label(drawn, fmt="%.1f", padding=3)
    bars.invert_yaxis()
    bars.set_xlim(0, 118)  # room for the numbers
    bars.set_xlabel("after the last epoch, %")
    return figure

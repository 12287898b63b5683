"""The five rows of the poster, trained under one budget."""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import CHECKPOINT, UserError, check_new, counted, resumed, write

from .report import accuracies, draw
from .settings import PLACE, Settings
from .training import Run, load_data, train

ROWS = (
    ("float", "sgd"),
    ("ternary", "sgd"),
    ("ternary", "dfw"),
    ("xnor", "adam"),
    ("xnor", "dfw"),
)
# What the rows share; all else is a row's own.
BUDGET = ("epochs", "batch_size", "seed", "amp", "compile", "limit", "validate", "data", *PLACE)


def run_table(given: dict[str, Any], out: Path, resume: bool) -> None:
    """Train the rows that are not done yet, then print and save the table and its figure."""
    for name in given:
        if name not in BUDGET:
            raise UserError(f"--{name.replace('_', '-')} does not go with --table; leave it out")
    rows = [out / f"{net}-{optimizer}" for net, optimizer in ROWS]
    if not resume:
        check_new(rows[0], "--out")
    else:
        stored = asdict(resumed(Settings, rows[0], given, PLACE))
        given = {name: stored[name] for name in BUDGET} | given
    runs: list[Run] = []
    for (net, optimizer), folder in zip(ROWS, rows, strict=True):
        print(f"[{len(runs) + 1}/{len(ROWS)}] ", end="")
        settings = Settings.choose(given | {"net": net, "optimizer": optimizer})
        begun = resume and (folder / CHECKPOINT).exists()
        data = runs[0].data if runs else load_data(settings)
        runs.append(train(settings, data, folder, begun))
    text = markdown(runs)
    write(out / "table.md", text.encode())
    lines = {f"{r.settings.net} {r.settings.optimizer}": accuracies(r.history) for r in runs}
    draw(out / "table.png", {f"{runs[0].data.held_out_name} accuracy, %": lines})
    print(f"\n{text}\ntable.md and table.png are in {out}", flush=True)


def markdown(runs: list[Run]) -> str:
    """The table in Markdown, with its conditions."""
    settings, data = runs[0].settings, runs[0].data
    lines = [
        f"ResNet-20 on {data.name}: {len(data.train):,} training images, "
        f"{counted(settings.epochs, 'epoch')}, batch size {settings.batch_size}. Accuracy on "
        f"{len(data.held_out):,} images, without a schedule that of the average.\n",
        f"| network | optimizer | lr | schedule | {data.held_out_name} accuracy, % | s an epoch |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        its, accuracy = run.settings, accuracies(run.history)[-1]
        seconds = statistics.mean(row["seconds"] for row in run.history)
        which = f"| {its.net} | {its.optimizer} | {run.rates[0]:g} | {its.schedule} "
        lines.append(which + f"| {accuracy:.2f} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"

"""What is told of runs: the accuracy they are judged by, a table, what is seen in it, a figure."""

import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from common import counted
from matplotlib.figure import Figure

NOTES = """\
Layers of an xnor network see only the signs of their inputs; its weights are binary. Levels: how
many values weights have, in all layers but the first and last. Bytes: of the packed file. DFW has
its default lr and no schedule; the average of its weights over the last tenth of all steps is
judged. SGD and Adam have a usual lr, a cosine schedule, and gradients that leave the rounding of
weights out ("straight-through"). Nothing is tuned; another seed gives other numbers."""


class Row(NamedTuple):
    """What is told of a training; accuracies are in percent, the first that before all steps."""

    net: str
    optimizer: str
    factor: float  # of the default lr
    accuracies: list[float]
    steps: int  # of an epoch
    levels: str
    bytes: int
    seconds: float  # of an epoch


def accuracies(history: list[dict[str, float]]) -> list[float]:
    """After each epoch, in percent: of the average if there is one, else of the last weights."""
    held_out = next(key for key in history[0] if key in ("test_accuracy", "validation_accuracy"))
    return [100 * row.get("average_accuracy", row[held_out]) for row in history]


def report(rows: list[Row], swept: list[Row], conditions: str) -> str:
    """The table in Markdown, with its conditions, and what is to be seen in it."""
    after = sorted({1, len(rows[0].accuracies) - 1})
    heads = ["network", "optimizer", *(counted(i, "epoch") for i in after)]
    cells = [[*heads, "levels", "bytes", "s/epoch"]]
    for row in rows:
        heights = [f"{row.accuracies[i]:.1f} %" for i in after]
        more = [row.levels, f"{row.bytes:,}", f"{row.seconds:.1f}"]
        cells.append([row.net, row.optimizer, *heights, *more])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    first, *others = (textwrap.fill(text, 79) for text in (conditions, NOTES, seen(rows, swept)))
    return "\n\n".join([first, "\n".join(lines), *others]) + "\n"


def seen(rows: list[Row], swept: list[Row]) -> str:
    """How DFW compares with the row before, and how much either depends on lr."""
    pairs, gaps = [*zip(rows[::2], rows[1::2], strict=True)], []
    for i in sorted({1, len(rows[0].accuracies) - 1}):
        each = [f"{dfw.net} {dfw.accuracies[i] - it.accuracies[i]:+.1f}" for it, dfw in pairs]
        gaps.append(f"after {counted(i, 'epoch')} {', '.join(each)}")
    text = f"By so many points DFW is ahead (+) or behind (-): {'; '.join(gaps)}."
    if swept:
        best, factors = max(row.accuracies[-1] for row in swept), [row.factor for row in swept]
        good = {row.optimizer: 0 for row in swept}
        for row in swept:
            good[row.optimizer] += row.accuracies[-1] > best - 5
        text += (
            f" Of {len(swept) // 2} values of lr, from {min(factors):.2g} to {max(factors):.2g} "
            f"times the default, {' and '.join(f'{n} with {name}' for name, n in good.items())} "
            f"bring {swept[0].net} within 5 points of the best run, {best} %."
        )
    return text


def draw(path: Path, rows: list[Row], swept: list[Row]) -> None:
    """Draw accuracy over steps and, if there is a sweep, over lr."""
    figure = Figure(figsize=(10 if swept else 6, 4.5), layout="constrained")
    left, *right = figure.subplots(1, 1 + bool(swept), squeeze=False)[0]
    colors = {row.net: f"C{i // 2}" for i, row in enumerate(rows)}

    def line(axis: Any, row: Row, x: list[Any], y: list[float]) -> None:
        style = "o-" if row.optimizer == "DFW" else "x--"
        axis.plot(x, y, style, color=colors[row.net], label=f"{row.net} {row.optimizer}")

    for row in rows:
        line(left, row, [i * row.steps for i in range(len(row.accuracies))], row.accuracies)
    left.set(xlabel="steps", ylabel="accuracy, %", title="At the default lr")
    for _, group in groupby(swept, lambda row: row.optimizer):
        points = [*group]
        line(right[0], points[0], [r.factor for r in points], [r.accuracies[-1] for r in points])
        right[0].set(xscale="log", xlabel="lr, times its default", title=f"{swept[0].net} by lr")
    for axis in (left, *right):
        axis.set_ylim(0, 100)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=200)

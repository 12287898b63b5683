"""The accuracy that a run is judged by, and pictures."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

History = list[dict[str, float]]


def accuracies(history: History) -> list[float]:
    """After each epoch, in percent: of the average if there is one, else of the last weights."""
    held_out = next(key for key in history[0] if key in ("test_accuracy", "validation_accuracy"))
    return [100 * row.get("average_accuracy", row[held_out]) for row in history]


def draw(path: Path, panels: dict[str, dict[str, list[float]]]) -> None:
    """Draw panels of named lines over the epochs."""
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, heights in lines.items():
            axis.plot(range(1, len(heights) + 1), heights, marker=".", label=name)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    figure.savefig(path, dpi=120)


def draw_curves(path: Path, history: History) -> None:
    """Draw loss, accuracy and γ of one run."""
    panels: dict[str, dict[str, list[float]]] = {}
    for what in ("loss", "accuracy", "gamma_mean"):
        keys = [key for key in history[0] if key.endswith(what)]
        panels[what.replace("_", " ")] = {key: [row[key] for row in history] for key in keys}
    draw(path, panels)

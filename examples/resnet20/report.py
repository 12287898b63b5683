"""What a run leaves behind: metrics as CSV, curves as a picture; and its lines of text."""

import csv
import io
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import write_atomically, write_text

METRICS = "metrics.csv"
CURVES = "curves.png"

Row = dict[str, float]

_COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "held_out_loss",
    "held_out_accuracy",
    "gamma_mean",
    "at_bound",
    "flip_rate",
    "seconds",
    "skipped_steps",
    "average_loss",
    "average_accuracy",
)


def epoch_line(row: Row, epochs: int, held_out: str) -> str:
    """One epoch in one line; what does not apply to the run is left out."""
    parts = [
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}",
        f"lr {row['lr']:.2g}",
        f"train {row['train_loss']:.3f}, {_percent(row['train_accuracy'])}",
        f"{held_out} {row['held_out_loss']:.3f}, {_percent(row['held_out_accuracy'])}",
    ]
    if _averaged(row):
        parts.append(f"average {row['average_loss']:.3f}, {_percent(row['average_accuracy'])}")
    if not math.isnan(row["gamma_mean"]):
        parts.append(f"γ {row['gamma_mean']:.2f}")
    if not math.isnan(row["at_bound"]):
        parts.append(f"at bound {_percent(row['at_bound'])}")
        parts.append(f"flips {_percent(row['flip_rate'])}")
    if row["skipped_steps"] > 0:
        parts.append(f"{row['skipped_steps']} steps skipped (loss or gradient not finite)")
    parts.append(f"{row['seconds']:.1f} s")
    return "  ".join(parts)


def last_line(history: list[Row], held_out: str) -> str:
    """How good the network has become."""
    row = history[-1]
    average = f", of the average {100 * row['average_accuracy']:.2f} %" if _averaged(row) else ""
    accuracy = 100 * row["held_out_accuracy"]
    return f"{held_out} accuracy {accuracy:.2f} %{average} after {len(history)} epochs"


def write_metrics(out: Path, history: list[Row], held_out: str) -> Path:
    """Write all epochs so far; a cell is empty where its column does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.replace("held_out", held_out) for column in _COLUMNS])
    for row in history:
        writer.writerow([_cell(row.get(column, math.nan)) for column in _COLUMNS])
    write_text(out / METRICS, text.getvalue())
    return out / METRICS


def write_curves(out: Path, history: list[Row], title: str, held_out: str) -> Path:
    """Draw loss, accuracy, γ, share at the bound and flip rate over the epochs."""
    losses = {"train": "train_loss", held_out: "held_out_loss"}
    accuracies = {"train": "train_accuracy", held_out: "held_out_accuracy"}
    if _averaged(history[-1]):
        losses["average"], accuracies["average"] = "average_loss", "average_accuracy"
    panels = (
        ("loss", losses, 1),
        ("accuracy, %", accuracies, 100),
        ("γ, mean of the epoch", {"": "gamma_mean"}, 1),
        ("latents at a bound, %", {"": "at_bound"}, 100),
        ("weights flipped in the epoch, %", {"": "flip_rate"}, 100),
    )
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3).flatten()
    epochs = [row["epoch"] for row in history]
    for axis, (name, lines, factor) in zip(axes, panels, strict=False):
        _panel(axis, name)
        for label, column in lines.items():
            values = [factor * row[column] for row in history]
            axis.plot(epochs, values, marker=".", label=label)
        if len(lines) > 1:
            axis.legend()
        if all(math.isnan(row[column]) for row in history for column in lines.values()):
            axis.text(0.5, 0.5, "does not apply", ha="center", transform=axis.transAxes)
            axis.set_yticks([])
    axes[2].set_ylim(-0.05, 1.05)  # γ
    axes[-1].set_axis_off()
    save_figure(out / CURVES, figure)
    return out / CURVES


def save_figure(path: Path, figure: Figure) -> None:
    """Write ``figure`` as a PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _panel(axis: Axes, name: str) -> None:
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _averaged(row: Row) -> bool:
    return not math.isnan(row.get("average_accuracy", math.nan))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"

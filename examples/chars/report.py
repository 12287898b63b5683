"""What a run leaves behind: metrics as CSV; and its lines of text."""

import csv
import io
import math
from pathlib import Path

from resnet20.files import write_text

METRICS = "metrics.csv"

Row = dict[str, float]

_COLUMNS = ("step", "lr", "train_loss", "val_loss", "gamma_mean", "at_bound", "seconds")


def line(row: Row, steps: int) -> str:
    """One row in one line; what does not apply to the run is left out."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"lr {row['lr']:.2g}",
        f"train {row['train_loss']:.3f}",
        f"validation {row['val_loss']:.3f}",
    ]
    if not math.isnan(row["gamma_mean"]):
        parts.append(f"γ {row['gamma_mean']:.2f}")
    if not math.isnan(row["at_bound"]):
        parts.append(f"at bound {100 * row['at_bound']:.1f} %")
    parts.append(f"{row['seconds']:.1f} s")
    return "  ".join(parts)


def write_metrics(out: Path, history: list[Row]) -> Path:
    """Write all rows so far; a cell is empty where its column does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in history:
        values = [row[column] for column in _COLUMNS]
        writer.writerow(["" if math.isnan(value) else f"{value:.6g}" for value in values])
    write_text(out / METRICS, text.getvalue())
    return out / METRICS

"""What a run leaves behind: a table in Markdown, a CSV, a picture."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from resnet20.files import write_atomically, write_text

from dfw_opt import native

from .contenders import REFERENCES, SEARCH
from .measure import Job
from .shapes import Shape

TABLE = "step_speed.csv"
FIGURE = "step_speed.png"

Row = dict[str, Any]

COLUMNS = (
    *("shape", "parameters", "tensors", "optimizer", "situation"),
    *("gamma", "gamma_min", "gamma_max"),
    *("ms", "ms_quartile_1", "ms_quartile_3", "of_adamw_fused", "of_sgd_foreach"),
    *("extra_bytes", "extra_percent", "state_bytes", "state_bytes_per_parameter"),
    *("repeats", "device", "threads", "kernels", "torch"),
)

_COLOURS = (
    ("dfw-original", "dimgray"),
    *((name, "silver") for name in ("sgd", "adamw")),
    *((name, "tab:blue") for name in ("dfw", "box")),
    *((name, "tab:orange") for name in ("binary", "ternary")),
)


def rows(shape: Shape, jobs: Sequence[Job], device: torch.device) -> list[Row]:
    """One row for each job, with the columns of the CSV."""
    medians = {job.contender.name: statistics.median(job.milliseconds) for job in jobs}
    adamw, sgd = (medians[name] for name in REFERENCES)
    place = surroundings(device)
    result = []
    for job in jobs:
        low, middle, high = statistics.quantiles(job.milliseconds, n=4, method="inclusive")
        row: Row = {
            "shape": shape.name,
            "parameters": shape.parameters,
            "tensors": len(shape.dimensions),
            "optimizer": job.contender.name,
            "situation": job.situation,
        }
        if job.gammas:
            row["gamma"] = statistics.median(job.gammas)
            row["gamma_min"], row["gamma_max"] = min(job.gammas), max(job.gammas)
        row |= {
            "ms": middle,
            "ms_quartile_1": low,
            "ms_quartile_3": high,
            "of_adamw_fused": middle / adamw,
            "of_sgd_foreach": middle / sgd,
            "extra_bytes": job.extra_bytes,
            "extra_percent": 100 * job.extra_bytes / (4 * shape.parameters),
            "state_bytes": job.state_bytes,
            "state_bytes_per_parameter": job.state_bytes / shape.parameters,
            "repeats": len(job.milliseconds),
        }
        result.append(row | place)
    return result


def surroundings(device: torch.device) -> Row:
    """Where the steps are taken."""
    on_cpu = device.type == "cpu"
    return {
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "kernels": "compiled" if on_cpu and native.library() is not None else "torch",
        "torch": torch.__version__,
    }


def markdown(rows: Sequence[Row]) -> str:
    """The rows of one shape as a table."""
    lines = [
        "| optimizer | γ | ms a step | quartiles | of AdamW fused | of SGD foreach | "
        "extra memory | state, bytes a parameter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gamma = f"{row['gamma']:.2f}" if "gamma" in row else ""
        lines.append(
            f"| {label(row)} | {gamma} | {row['ms']:.3g} | "
            f"{row['ms_quartile_1']:.3g} to {row['ms_quartile_3']:.3g} | "
            f"{row['of_adamw_fused']:.2f} | {row['of_sgd_foreach']:.2f} | "
            f"{size(row['extra_bytes'])}, {row['extra_percent']:.1f} % | "
            f"{row['state_bytes_per_parameter']:.2f} |"
        )
    return "\n".join(lines)


def write_table(out: Path, rows: Sequence[Row]) -> Path:
    """Write the CSV; a cell is empty where its column does not apply."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(out / TABLE, text.getvalue())
    return out / TABLE


def write_figure(out: Path, rows: Sequence[Row]) -> Path:
    """Draw the times as multiples of AdamW's, a panel for each shape."""
    by_shape: dict[str, list[Row]] = {}
    for row in rows:
        by_shape.setdefault(row["shape"], []).append(row)
    columns = min(3, len(by_shape))
    lines = -(-len(by_shape) // columns)
    height = 1 + 0.22 * max(map(len, by_shape.values()))
    figure = Figure(figsize=(1.5 + 3.5 * columns, 0.7 + lines * height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (shape, those) in zip(axes, by_shape.items(), strict=False):
        _panel(axis, shape, those)
    for axis in axes[len(by_shape) :]:
        axis.set_axis_off()
    for number, axis in enumerate(axes):
        if number % columns:
            axis.set_yticklabels([])
    first = rows[0]
    threads = f", threads: {first['threads']}" if first["device"] == "cpu" else ""
    figure.suptitle(
        f"Time of a step, AdamW (fused) = 1; median and quartiles of {first['repeats']}\n"
        f"{first['device']}{threads}, torch {first['torch']}",
        fontsize=10,
    )
    write_atomically(out / FIGURE, lambda file: figure.savefig(file, format="png", dpi=150))
    return out / FIGURE


def label(row: Row) -> str:
    return f"{row['optimizer']}, {row['situation']}" if row["situation"] else str(row["optimizer"])


def size(number: int) -> str:
    """Bytes, in words."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} B"


def _panel(axis: Axes, shape: str, rows: Sequence[Row]) -> None:
    ratios = [row["of_adamw_fused"] for row in rows]
    unit = rows[0]["ms"] / ratios[0]
    spread = [
        [ratio - row["ms_quartile_1"] / unit for ratio, row in zip(ratios, rows, strict=True)],
        [row["ms_quartile_3"] / unit - ratio for ratio, row in zip(ratios, rows, strict=True)],
    ]
    bars = axis.barh(
        range(len(rows)),
        ratios,
        color=[_colour(row["optimizer"]) for row in rows],
        hatch=["///" if row["situation"] == SEARCH else "" for row in rows],
        edgecolor="white",
        xerr=spread,
        error_kw={"linewidth": 0.8},
    )
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, 1.25 * max(row["ms_quartile_3"] for row in rows) / unit)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(f"{shape}: 1 = {unit:.3g} ms", fontsize=9)


def _colour(optimizer: str) -> str:
    return next(colour for name, colour in _COLOURS if optimizer.startswith(name))

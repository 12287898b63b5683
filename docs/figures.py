"""Make the figures of these pages: python docs/figures.py [NAME ...]

Each is drawn from numbers that the package itself computes (its optimizers, norms and step sizes),
in float64, so that they are the same on every machine. Only the quick start's are those of one
training run, and those of the results page of the runs in docs/runs. Into docs/_static/figures go,
for each source below, the numbers as JSON, and for each figure an SVG whose colours follow the page
(docs/_ext/inline_svg.py). Needs the extra "examples"; tests/test_docs_figures.py checks that
nothing is out of date.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "examples"), str(DOCS)]

import quick_start  # noqa: E402
import results  # noqa: E402

from dfw_opt import (  # noqa: E402
    DFW,
    MultiClassHingeLoss,
    ProjectedDFW,
    TernaryDFW,
    param_groups,
)
from dfw_opt.norms import polar  # noqa: E402
from dfw_opt.step_size import closed_form, exact  # noqa: E402
from dfw_opt.variables import Variable  # noqa: E402

THIN: Data = {"color": "black", "alpha": 0.6, "linewidth": 1}
TITLE: Data = {"loc": "left", "fontsize": "medium"}
FOLDER = DOCS / "_static" / "figures"

Data = dict[str, Any]
"""Numbers, lists of numbers, and dictionaries of these: what JSON can hold."""


# ---- The step, in one dimension ----


def step_data() -> Data:
    """The loss w² and its plane, seen from w = 1, and the steps of SGD and of DFW in a ball."""
    square, start = nn.MSELoss(), torch.ones(1, dtype=torch.float64)
    optimizers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "sgd": lambda w: torch.optim.SGD(w, lr=1.0),
        "dfw": lambda w: DFW(w, lr=10.0, momentum=0.0, eps=0.0),  # of a vector's size, 0.1
    }
    data: Data = {"start": 1.0}
    for name, make in optimizers.items():
        w = nn.Parameter(start.clone())
        optimizer = make([w])
        loss = square(w, torch.zeros_like(w))
        loss.backward()
        optimizer.step(**({"loss": loss} if name == "dfw" else {}))
        data[name] = w.item()
    assert isinstance(optimizer, DFW)
    assert w.grad is not None
    data["gamma"] = optimizer.gamma.item()
    data["radius"] = (data["start"] - data["dfw"]) / data["gamma"]
    grid = torch.linspace(-1.5, 2.5, 81, dtype=torch.float64)  # the plane's zero is one of these
    line = loss + w.grad * (grid - start)
    curves = {"w": grid, "loss": grid.square(), "line": line, "cut": line.clamp(min=0)}
    return data | {name: curve.tolist() for name, curve in curves.items()}


def draw_step(data: Data) -> Figure:
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axis = figure.subplots()
    start, edge = data["start"], data["start"] - data["radius"]
    axis.axvspan(edge, start + data["radius"], facecolor="C2", alpha=0.15)
    axis.axhline(0, color="black", linewidth=0.6, alpha=0.5)
    axis.plot(data["w"], data["loss"], **THIN)
    axis.plot(data["w"], data["line"], "C1--")
    axis.plot(data["w"], data["cut"], "C0", linewidth=2.4)
    for name, colour in (("start", "black"), ("sgd", "C1"), ("dfw", "C0")):
        axis.plot(data[name], data[name] ** 2, "o", color=colour)
    axis.plot([data["dfw"]] * 2, [data["dfw"] ** 2, -1.35], "C0", linewidth=0.8, alpha=0.7)
    axis.plot([start, edge], [-1.6, -1.6], color="C2", marker="|", markersize=9, linewidth=1.2)
    axis.plot([start, data["dfw"]], [-1.35, -1.35], color="C0", marker="|", linewidth=2.4)
    axis.text(start + 0.08, -1.72, "full step", color="C2")
    axis.text(start + 0.08, -1.36, f"γ = {data['gamma']:g} of it", color="C0")
    axis.text(start, 3.45, "the ball", color="C2", ha="center", va="top")
    axis.text(-1.4, 2.5, "loss", color="black")
    axis.text(-0.18, -0.75, "plane", color="C1", ha="right")
    axis.text(-1.45, 0.1, "cut off at 0", color="C0")
    axis.text(start + 0.1, 0.85, "start", color="black", va="top")
    axis.text(data["sgd"] + 0.1, 1.1, "SGD", color="C1")
    axis.text(data["dfw"] - 0.06, 0.4, "DFW", color="C0", ha="right")
    axis.set(xlabel="w", xlim=(-1.5, 2.5), ylim=(-1.9, 3.5), yticks=[-1, 0, 1, 2, 3])
    axis.set_xticks([-1, 0, 0.5, 1, 2], ["−1", "0", "0.5", "1", "2"])
    return figure


# ---- The spectral ball, the averaged plane, and the zeros of ternary weights ----


def digits() -> tuple[Tensor, Tensor]:
    """The handwritten digits, a row of 64 numbers in [0, 1] each, and their labels."""
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float64).flatten(1) / 16
    return images, torch.tensor(loaded.target)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
        return nn.Sequential(*layers).double()


def training(net: nn.Sequential, optimizer: DFW | TernaryDFW, steps: int) -> Iterator[float]:
    """γ at each step of a small network, in batches of 50."""
    images, labels = digits()
    criterion, shuffle = MultiClassHingeLoss(smooth=True), torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randperm(len(labels), generator=shuffle)[:50]
        loss = criterion(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        yield optimizer.gamma.item()


def spectral_data() -> Data:
    """Singular values of a gradient, made as long as the spectral step, and of that step."""
    net = network()
    list(training(net, DFW(net.parameters(), lr=0.1), 8))
    gradient = net.get_parameter("2.weight").grad
    assert gradient is not None
    before, after = (torch.linalg.svdvals(x) for x in (gradient, polar(gradient.unsqueeze(0))[0]))
    before = before * after.norm() / before.norm()
    return {
        name: [round(x, 4) for x in values.tolist()]
        for name, values in (("before", before), ("after", after))
    }


def draw_spectral(data: Data) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    numbers = range(1, len(data["before"]) + 1)
    axis.bar(numbers, data["before"], width=0.9, color="C1")
    axis.axhline(1, **THIN | {"linestyle": ":"})
    axis.step(numbers, data["after"], "C0", where="mid", linewidth=2.4)
    axis.set_title("singular values", **TITLE)
    axis.text(3, 0.8 * data["before"][0], "of the gradient", color="C1")
    axis.text(14, 1.35, "of the spectral step", color="C0")
    axis.set(xlabel="number, the largest first", xlim=(0.4, len(data["before"]) + 0.6))
    return figure


def plane_data() -> Data:
    """γ of the plane of each batch, and of the averaged plane: two trainings."""
    data: Data = {}
    for name, momentum in (("batch", 0.0), ("averaged", 0.9)):
        net = network()
        data[name] = [*training(net, DFW(net.parameters(), lr=0.1, momentum=momentum), 200)]
    return data


def draw_plane(data: Data) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    steps = range(1, len(data["batch"]) + 1)
    axis.plot(steps, data["batch"], "C1", linewidth=1)
    axis.plot(steps, data["averaged"], "C0", linewidth=2)
    axis.set_title("γ, the share of the full step", **TITLE)
    axis.text(70, 0.88, "plane of the batch", color="C1")
    axis.text(34, -0.12, "averaged plane", color="C0")
    axis.set(xlabel="step", ylim=(-0.17, 1.05), xlim=(0, len(steps)), yticks=[0, 0.5, 1])
    return figure


def zeros_data() -> Data:
    """The latents of a ternary layer before and after training, and its zeros by threshold."""
    data: Data = {}
    for threshold in (None, 0.05):
        net = network()
        optimizer = TernaryDFW(param_groups(net), threshold=threshold)
        weight, shares = net.get_parameter("2.weight"), []
        for steps in (0, 200):
            list(training(net, optimizer, steps))
            shares.append(100 * (weight == 0).double().mean().item())
            if threshold is None:
                latent = optimizer.state[weight]["latent"]
                counts = torch.histc(latent, BINS, -1, 1)
                data["after" if steps else "before"] = (100 * counts / weight.numel()).tolist()
                data["threshold"] = 0.7 * latent.abs().mean().item()
        data[f"zeros at {threshold}"] = shares
    return data


BINS = 40


def draw_zeros(data: Data) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    edges = [2 * i / BINS - 1 for i in range(BINS + 1)]
    axis.stairs(data["after"], edges, fill=True, color="C0")
    axis.stairs(data["before"], edges, color="C1", linewidth=1.6)
    axis.axvspan(-data["threshold"], data["threshold"], facecolor="C2", alpha=0.25)
    axis.set_title("% of the latents", **TITLE)
    top = max(data["after"])
    axis.text(0, 0.95 * top, "these weights are 0", color="C2", va="top", ha="center")
    axis.text(-0.85, 0.3 * top, "at the start", color="C1")
    axis.text(0.9, 0.7 * top, "after 200 steps", color="C0", ha="right")
    axis.set(xlabel="latent u", xlim=(-1.02, 1.02), xticks=[-1, -0.5, 0, 0.5, 1])
    return figure


# ---- The dual, with a box and without ----


def dual_data() -> Data:
    """One step of a linear classifier of the digits, whose weights are in a box."""
    images, labels = digits()
    criterion = MultiClassHingeLoss()
    lr, radius = 1.0, 0.1
    weight = nn.Parameter(torch.zeros(10, 64, dtype=torch.float64))
    box: Data = {"quantizer": None, "radius": radius, "norm": "euclidean"}
    optimizer = ProjectedDFW([weight], lr, momentum=0.0, eps=0.0, **box)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(19):  # the last of these steps is shown
        batch = torch.randperm(len(labels), generator=shuffle)[:50]
        w = weight.detach().clone()
        loss = criterion(images[batch] @ weight.T, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    loss, delta = loss.detach(), weight.grad
    assert delta is not None

    def boxed(bound: float = radius) -> Variable:
        return Variable([w], [delta], [delta], lr, lower=-bound, upper=bound)

    def slope(gamma: Tensor, bound: float = radius) -> Tensor:
        return loss + boxed(bound).dual_slope(gamma)[0]

    def distance(gamma: Tensor, bound: float) -> Tensor:
        moved = (w - lr * gamma * delta).clamp(-bound, bound)
        return (moved - w).square().sum() / (2 * lr)

    def dual(gamma: Tensor, bound: float = radius) -> Tensor:
        return distance(gamma, bound) + gamma * slope(gamma, bound)

    def primal(gamma: Tensor) -> Tensor:
        return distance(gamma, radius) + slope(gamma).clamp(min=0)

    zero = torch.zeros_like(loss)
    start = closed_form(loss, zero, lr * delta.square().sum(), eps=0.0)
    found = exact(loss, [boxed()], start, 0.0)
    points = {"closed_form": start, "exact": found}
    torch.testing.assert_close(points["exact"], optimizer.gamma.double(), rtol=1e-6, atol=0)
    infinite = float("inf")
    grid = torch.linspace(0, 1, 51, dtype=torch.float64)
    return {
        "gamma": grid.tolist(),
        "slope": [slope(x).item() for x in grid],
        "slope_free": [slope(x, infinite).item() for x in grid],
        "dual": [dual(x).item() for x in grid],
        "dual_free": [dual(x, infinite).item() for x in grid],
        "primal": [primal(x).item() for x in grid],
        "points": {
            name: {
                "gamma": gamma.item(),
                "slope": slope(gamma).item(),
                "dual": dual(gamma).item(),
                "primal": primal(gamma).item(),
            }
            for name, gamma in points.items()
        },
    }


def draw_dual(data: Data) -> Figure:
    figure = Figure(figsize=(5, 5.8), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    gamma, closed, exact = data["gamma"], data["points"]["closed_form"], data["points"]["exact"]

    top.axhline(0, color="black", linewidth=0.6, alpha=0.5)
    top.plot(gamma, data["slope_free"], "C1--")
    top.plot(gamma, data["slope"], "C0", linewidth=2.4)
    top.plot([closed["gamma"]] * 2, [0, closed["slope"]], "C1o")
    top.plot(exact["gamma"], exact["slope"], "C0o")
    top.set_title("φ′(γ), the height of the plane at v(γ)", **TITLE)
    top.set_ylim(-1.3, 1.1)
    top.text(0.8, -0.12, "in the box", color="C0", va="top")
    top.text(0.83, -1.15, "without", color="C1", ha="right")
    top.text(closed["gamma"] - 0.02, -1.15, "closed form", color="C1", ha="right")
    top.text(exact["gamma"] + 0.02, 0.9, "exact", color="C0")
    top.text(
        closed["gamma"] - 0.02, -0.25, f"{closed['slope']:.2f} is left", color="C1", ha="right"
    )

    bottom.plot(gamma, data["dual_free"], "C1--")
    bottom.plot(gamma, data["dual"], "C0", linewidth=2.4)
    bottom.plot(gamma, data["primal"], "C2", linewidth=2.4)
    bottom.plot(closed["gamma"], closed["primal"], "C1o")
    bottom.plot(exact["gamma"], exact["primal"], "C0o")
    bottom.set_title("the dual φ(γ), and the objective at v(γ)", **TITLE)
    bottom.set_ylim(-0.1, 1.05)
    bottom.text(0.2, 0.75, "objective", color="C2")
    bottom.text(0.14, 0.02, "φ, in the box", color="C0")
    bottom.text(0.83, -0.06, "φ, without", color="C1", ha="right")
    bottom.text(closed["gamma"] + 0.01, 0.41, f"{closed['primal']:.3f}", color="C1")
    bottom.text(exact["gamma"] + 0.01, 0.41, f"{exact['primal']:.3f}", color="C0")
    for axis in (top, bottom):
        for point, colour in ((closed, "C1"), (exact, "C0")):
            axis.axvline(point["gamma"], color=colour, linewidth=0.8, alpha=0.7)
    ticks = [0, closed["gamma"], exact["gamma"], 1]
    bottom.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    bottom.set(xlabel="γ", xlim=(0, 1))
    return figure


# ---- The quick start ----


def quick_start_data() -> Data:
    """The three runs of examples/quick_start.py."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            runs = [quick_start.run(name, Path(folder)) for name in quick_start.OPTIMIZERS]
    finally:
        torch.set_num_threads(threads)
    return {"runs": [asdict(run) for run in runs]}


def draw_quick_start(data: Data) -> Figure:
    """What examples/quick_start.py draws, one panel below the other."""
    figure = Figure(figsize=(5, 7.6), layout="constrained")
    loss, gamma, *panels = figure.subplots(5, height_ratios=(1.8, 1.8, 1, 1, 1))
    size = quick_start.WIDEST
    edges = [size * (2 * i / quick_start.BINS - 1) for i in range(quick_start.BINS + 1)]
    for number, (it, panel) in enumerate(zip(data["runs"], panels, strict=True)):
        colour, steps = f"C{number}", range(5, len(it["losses"]), 10)
        loss.semilogy(steps, quick_start.means(it["losses"]), colour)
        gamma.plot(steps, quick_start.means(it["gammas"]), colour)
        panel.stairs(it["weights"], edges, fill=True, color=colour)
        panel.set_title(f"% of the {it['name']} weights", **TITLE)
        panel.set(xlim=(-size, size), xticks=[-0.2, -0.1, 0, 0.1, 0.2])
    loss.set_title("loss", **TITLE)
    loss.set_yticks([1, 0.3, 0.1, 0.03, 0.01], ["1", "0.3", "0.1", "0.03", "0.01"])
    loss.minorticks_off()
    gamma.legend(loss.get_lines(), [it["name"] for it in data["runs"]], frameon=False)
    gamma.set_title("γ", **TITLE)
    gamma.set(xlabel="step", ylim=(0, None))
    return figure


# ---- Results ----


def sweep_data() -> Data:
    """Accuracy by lr of every net and optimizer: a list of pairs."""
    swept = results.sweep()
    return {
        net: {who: [list(p) for p in swept[net, who].items()] for who in results.SWEPT}
        for net in results.NETS
    }


LINES = {"DFW": "C3", "Euclidean DFW": "C0", "Adam": "C1", "SGD": "C2", "Muon": "C4", "PARQ": "C4"}
LINES["Muon, average"] = "gray"  # which PARQ's may cross


def draw_sweep(data: Data) -> Figure:
    figure = Figure(figsize=(5, 8.4), layout="constrained")
    axes = figure.subplots(len(data), sharex=True)
    for axis, (net, lines) in zip(axes, data.items(), strict=True):
        for who, pairs in lines.items():
            rates, values = zip(*pairs, strict=True)
            best = max(range(len(values)), key=values.__getitem__)
            width = 2.4 if who == "DFW" else 1.2
            axis.plot(rates, values, LINES[who], marker="o", markersize=3, linewidth=width)
            axis.plot(rates[best], values[best], "o", color=LINES[who], markersize=7)
        axis.set_title(results.NAMES[net], **TITLE)
        axis.set(xscale="log", ylim=(5, 75), yticks=[10, 20, 30, 40, 50, 60, 70])
        axis.axhline(10, **THIN)
    places = {
        "DFW": (3, 60),
        "Euclidean DFW": (4, 42),
        "Adam": (1e-4, 51),
        "SGD": (1.5, 15),
        "Muon": (0.06, 58),
    }
    for who, (x, y) in places.items():
        axes[0].text(x, y, who, color=LINES[who])
    axes[-1].set_xlabel("lr")
    return figure


def curves_data() -> Data:
    """Test accuracy after each epoch of the long runs, in percent."""
    data: Data = {net: {} for net in results.NETS}
    for run in results.pick(results.as_used("30"), seed="0"):
        data[run["net"]]["DFW" if run.optimizer == "DFW" else run.who] = run.accuracies
    return data


def draw_curves(data: Data) -> Figure:
    figure = Figure(figsize=(5, 9), layout="constrained")
    axes = figure.subplots(len(data), sharex=True)
    for axis, (net, lines) in zip(axes, data.items(), strict=True):
        for who, values in lines.items():
            width, time = (2.4, results.TIME) if who == "DFW" else (1.2, 1)
            times = [time * epoch for epoch in range(1, len(values) + 1)]
            axis.plot(times, values, color=LINES[who], linewidth=width)
        axis.set_title(results.NAMES[net], **TITLE)
        axis.set(ylim=(40, 92), yticks=[40, 50, 60, 70, 80, 90])
    axes[0].text(10, 60, "Muon, average", color=LINES["Muon, average"])
    axes[1].text(1, 82, "DFW", color=LINES["DFW"])
    for y, who in zip((64, 57, 50, 43), ("Euclidean DFW", "Adam", "SGD", "PARQ"), strict=True):
        axes[1].text(10, y, who, color=LINES[who])
    axes[-1].set_xlabel("time, in epochs of the others")
    return figure


# ---- All of them ----

SOURCES: dict[str, tuple[Callable[[], Data], Callable[[Data], Figure]]] = {
    "step": (step_data, draw_step),
    "spectral": (spectral_data, draw_spectral),
    "plane": (plane_data, draw_plane),
    "zeros": (zeros_data, draw_zeros),
    "dual": (dual_data, draw_dual),
    "quick_start": (quick_start_data, draw_quick_start),
    "sweep": (sweep_data, draw_sweep),
    "curves": (curves_data, draw_curves),
}
"""What is computed, and how it is drawn, by the name of the JSON and the SVG."""


def svg(name: str, draw: Callable[[Data], Figure], data: Data) -> str:
    """One figure as the text of its file."""
    file = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("axes.spines", right=False, top=False)
        matplotlib.rc("figure", dpi=72)
        matplotlib.rc("font", size=12.5)  # a figure is about as wide as a phone
        matplotlib.rc("svg", fonttype="none")
        draw(data).savefig(file, format="svg", transparent=True)
    return tidy(file.getvalue(), name)


# matplotlib's colours, as a page may set them; the second is for wherever nothing is set.
COLOURS = {
    "#000000": "currentColor",
    "#1f77b4": "var(--figure-1, #3987c9)",
    "#ff7f0e": "var(--figure-2, #d9730d)",
    "#2ca02c": "var(--figure-3, #2f9a4f)",
    "#d62728": "var(--figure-4, #d62728)",
    "#9467bd": "var(--figure-5, #9467bd)",
    "#808080": "var(--figure-0, #808080)",
}
NAMESPACE = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"


def tidy(text: str, name: str) -> str:
    """Matplotlib's SVG, ready to be a part of a page.

    Colours become variables of the page, and text takes its font. What differs from run to run goes
    (the date), as does what nobody sees (digits) or would reach beyond the figure: a style sheet,
    and ids, but for those that something refers to, which begin with ``name``.
    """
    ElementTree.register_namespace("", NAMESPACE)
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{NAMESPACE}}}{tag}" for tag in ("metadata", "style")):
                parent.remove(child)
    used = dict.fromkeys(re.findall(r"#(\w+)[\")]", text))
    new = {old: f"{name}-{i}" for i, old in enumerate(used)}
    for element in root.iter():
        element.text, element.tail = (element.text or "").strip(), ""
        if HREF in element.attrib:
            element.set("href", element.attrib.pop(HREF))
        if element.get("id") not in new:
            element.attrib.pop("id", None)
        for key, value in element.items():
            if key == "id":
                value = new[value]
            elif key == "href" or value.startswith("url(#"):
                value = re.sub(r"#(\w+)", lambda match: f"#{new[match[1]]}", value)
            elif key == "style":
                value = re.sub(r"font-family:[^;]*;? *", "", value)
                value = re.sub(r"#[0-9a-f]{6}", lambda match: COLOURS[match[0]], value)
            elif key in ("d", "x", "y", "transform"):
                value = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.4g}", value)
                value = " ".join(value.split())
            element.set(key, value)
        if (element.get("transform") or "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    root.set("color", "#808080")  # of wherever nothing else is set
    root.set("fill", "currentColor")
    root.set("font-family", "DejaVu Sans, Verdana, sans-serif")
    root.set("stroke-linejoin", "round")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def rounded(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_json(data: Data) -> str:
    """A line for each entry."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(source: str, folder: Path) -> None:
    """Compute the numbers of ``source``, and draw them."""
    compute, draw = SOURCES[source]
    data = rounded(compute())
    (folder / f"{source}.json").write_text(as_json(data), encoding="utf-8")
    (folder / f"{source}.svg").write_text(svg(source, draw, data), encoding="utf-8")
    if source == "quick_start":
        text = quick_start.report([quick_start.Run(**run) for run in data["runs"]])
        (folder / f"{source}.txt").write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    """Make all figures, or those that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: %(default)s")
    given = parser.parse_args()
    if unknown := set(given.names) - set(SOURCES):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    given.out.mkdir(parents=True, exist_ok=True)
    for source in given.names or SOURCES:
        write(source, given.out)


if __name__ == "__main__":
    main()

"""Train one small network three times, float, binary and ternary, and draw what happened.

    python quick_start.py

takes some ten seconds. The figures, and each network as a packed file, are in runs/quick-start.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW, param_groups, save_packed

digits = load_digits()  # 1,797 images of 8 x 8 pixels
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:1500], order[1500:]


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


Optimizer = DFW | ProjectedDFW | TernaryDFW
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "float": lambda net: DFW(net.parameters(), lr=0.1),
    "binary": lambda net: ProjectedDFW(param_groups(net), lr=0.1),
    "ternary": lambda net: TernaryDFW(param_groups(net), lr=0.1),
}


Curve = list[float]


def fit(net: nn.Module, optimizer: Optimizer) -> tuple[Curve, Curve]:
    criterion = MultiClassHingeLoss()
    losses, gammas = [], []
    net.train()
    for _ in range(5):
        for batch in torch.split(train[torch.randperm(len(train))], 50):
            loss = criterion(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)  # the one line that differs
            losses.append(loss.item())
            gammas.append(optimizer.gamma.item())
    return losses, gammas


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    net.eval()
    hits = net(images[test]).argmax(dim=1) == labels[test]
    return float(hits.float().mean())


@dataclass
class Run:
    """What is kept of one training."""

    name: str
    losses: Curve
    gammas: Curve
    before: Curve
    after: Curve
    accuracy: float
    bytes: int


def run(name: str, folder: Path) -> Run:
    torch.manual_seed(0)  # the same start, and the same batches, for all three
    net = make_net()
    weight = net.get_parameter("3.weight")  # of the second convolution
    before = histogram(weight)
    losses, gammas = fit(net, OPTIMIZERS[name](net))
    path = folder / f"{name}.dfw"
    save_packed(net, path)
    size = path.stat().st_size
    return Run(name, losses, gammas, before, histogram(weight), accuracy(net), size)


WIDEST, BINS = 0.16, 127


def histogram(weight: Tensor) -> Curve:
    """The percentage of the weights in each bin; what is beyond the ends is in the outermost."""
    inside = weight.detach().clamp(-WIDEST, WIDEST)
    counts = torch.histc(inside, BINS, -WIDEST, WIDEST)
    return (100 * counts / counts.sum()).tolist()


def means(values: Curve, length: int = 10) -> Curve:
    return [sum(values[i : i + length]) / length for i in range(0, len(values), length)]


def report(runs: list[Run]) -> str:
    """A row for each; gamma is the mean of the first 30 steps, and of the last."""
    lines = ["network  accuracy  first gamma  last gamma    bytes"]
    for it in runs:
        first, *_, last = means(it.gammas, 30)
        share = f"{first:11.2f}  {last:10.2f}"
        lines.append(f"{it.name:7}  {it.accuracy:8.1%}  {share}  {it.bytes:7,}")
    return "\n".join(lines)


def draw_training(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    loss, gamma = figure.subplots(2, sharex=True)
    for it in runs:
        steps = [10 * i + 5 for i in range(len(means(it.losses)))]
        loss.semilogy(steps, means(it.losses), label=it.name)
        gamma.plot(steps, means(it.gammas), label=it.name)
    loss.set_ylabel("loss")
    loss.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    loss.legend(frameon=False)
    gamma.set(xlabel="step", ylabel="γ", ylim=(0, 1))
    return figure


def draw_weights(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    rows = figure.subplots(1 + len(runs), sharex=True)
    panels = [("before, all three", runs[0].before), *((it.name, it.after) for it in runs)]
    edges = [WIDEST * (2 * i / BINS - 1) for i in range(BINS + 1)]
    for i, (axis, (name, heights)) in enumerate(zip(rows, panels, strict=True)):
        colour = f"C{i - 1}" if i else "gray"
        axis.stairs(heights, edges, fill=True, color=colour)
        axis.set_title(name, loc="left", fontsize="medium")
        axis.set_ylabel("%")
    rows[-1].set(xlabel="weight", xlim=(-WIDEST, WIDEST))
    return figure


def draw_bytes(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(5, 1.6), layout="constrained")
    axis = figure.subplots()
    sizes = [it.bytes for it in runs]
    bars = axis.barh([it.name for it in runs], sizes, color=["C0", "C1", "C2"])
    axis.bar_label(bars, [f"{size:,}" for size in sizes], padding=4)
    axis.invert_yaxis()
    axis.set(xlabel="bytes of the packed file", xlim=(0, 1.2 * max(sizes)), xticks=[])
    return figure


FIGURES = {"training": draw_training, "weights": draw_weights, "bytes": draw_bytes}


def main(arguments: list[str] | None = None) -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quick-start"), help="default: %(default)s"
    )
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so small a network gains nothing from more

    runs = [run(name, out) for name in OPTIMIZERS]
    print(report(runs))
    for name, draw in FIGURES.items():
        draw(runs).savefig(out / f"{name}.png", dpi=150)
    print(f"figures and packed files: {out}")


if __name__ == "__main__":
    main()

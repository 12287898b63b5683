"""Train one small network three times, float, binary and ternary, and draw what happened.

    python quick_start.py

takes some ten seconds. The figure, and each network as a packed file, are in runs/quick-start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Parser
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, param_groups, save_packed

digits = load_digits()  # 1,797 images of 8 x 8 pixels
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:1500], order[1500:]


def make_net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 32, 2), (32, 64, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


Optimizer = DFW | ProjectedDFW | TernaryDFW
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "float": lambda net: DFW(param_groups(net)),
    "binary": lambda net: ProjectedDFW(param_groups(net)),
    "ternary": lambda net: TernaryDFW(param_groups(net)),
}
WIDEST, BINS = 0.2, 127  # of the histogram


def fit(net: nn.Module, optimizer: Optimizer) -> tuple[list[float], list[float]]:
    criterion = nn.CrossEntropyLoss()
    losses, gammas = [], []
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
    losses: list[float]
    gammas: list[float]
    weights: list[float]
    accuracy: float
    bytes: int


def run(name: str, folder: Path) -> Run:
    torch.manual_seed(0)  # the same start, and the same batches, for all three
    net = make_net()
    losses, gammas = fit(net, OPTIMIZERS[name](net))
    path = folder / f"{name}.packed"
    save_packed(net, path)
    weight = net.get_parameter("3.weight").detach()  # of the second convolution
    histogram = 100 / weight.numel() * torch.histc(weight, BINS, -WIDEST, WIDEST)
    return Run(name, losses, gammas, histogram.tolist(), accuracy(net), path.stat().st_size)


def means(values: list[float], length: int = 10) -> list[float]:
    return [sum(values[i : i + length]) / length for i in range(0, len(values), length)]


def report(runs: list[Run]) -> str:
    """A row for each; gamma is the mean of the first 30 steps, and of the last."""
    lines = ["network  accuracy  first gamma  last gamma    bytes"]
    for it in runs:
        first, *_, last = means(it.gammas, 30)
        lines.append(f"{it.name:7}  {it.accuracy:8.1%}  {first:11.2f}  {last:10.2f}  {it.bytes:7,}")
    return "\n".join(lines)


def draw(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    (loss, gamma, empty), panels = figure.subplots(2, 3)
    empty.set_axis_off()
    edges = [WIDEST * (2 * i / BINS - 1) for i in range(BINS + 1)]
    for it, panel in zip(runs, panels, strict=True):
        steps = [10 * i + 5 for i in range(len(it.losses) // 10)]
        loss.semilogy(steps, means(it.losses), label=it.name)
        gamma.plot(steps, means(it.gammas), label=it.name)
        panel.stairs(it.weights, edges, fill=True)
        panel.set(xlabel=f"{it.name} weights", ylabel="%")
    loss.set(xlabel="step", ylabel="loss")
    gamma.set(xlabel="step", ylabel="γ")
    gamma.legend(frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Train, print and draw."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quick-start"))
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so small a network gains nothing from more

    runs = [run(name, out) for name in OPTIMIZERS]
    print(report(runs))
    print("gamma: the share of the longest step that was taken; first and last 30 steps")
    draw(runs).savefig(out / "training.png", dpi=150)
    print(f"figure and packed files: {out}")


if __name__ == "__main__":
    main()

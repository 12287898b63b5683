"""How often the search for γ evaluates the slope: in real training, and on inputs made to be hard.

An evaluation is one pass over the weights in the box. A step whose γ follows from the closed form
alone takes none.
"""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from resnet20.data import Data, load
from resnet20.settings import Settings
from resnet20.training import Run
from torch import Tensor

import dfw_opt.optimizer
from dfw_opt.step_size import box_slope, climb, closed_form, maximize

NETS = ("xnor", "ternary")
LRS = (0.1, 1.0, 10.0)
_COLUMNS = ("gradients", "steps", "searched", "median", "worst")

Slope = Callable[[Tensor], tuple[Tensor, Tensor]]


class Counted:
    """A slope that counts how often it is evaluated."""

    def __init__(self, slope: Slope) -> None:
        self.slope = slope
        self.calls = 0

    def __call__(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.slope(gamma)


def table(data: Path | None, steps: int) -> Iterator[str]:
    """The lines of a table, as they come."""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|" + "---|" * len(_COLUMNS)
    images = load(data, steps * 128 if data else None)
    for net in NETS:
        for lr in LRS:
            yield _line(
                f"{net} ResNet-20, {images.name}, lr {lr:g}", training(net, lr, images, steps)
            )
    for name, counts in adversarial():
        yield _line(name, counts)


def training(net: str, lr: float, data: Data, steps: int) -> list[int]:
    """The evaluations of each of the first ``steps`` steps of the example."""
    given = {"net": net, "lr": lr, "schedule": "none", "epochs": steps, "device": "cpu"}
    settings = Settings.choose(given | ({} if data.name == "digits" else {"data": "."}))
    run = Run(settings, data)
    counts: list[int] = []
    module: Any = dfw_opt.optimizer
    originals = module.climb, module.maximize

    def counting(search: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(slope: Slope, *arguments: Tensor, **options: Tensor) -> Tensor:
            counter = Counted(slope)
            gamma = search(counter, *arguments, **options)
            counts[-1] = counter.calls
            return gamma

        return counted

    try:
        module.climb, module.maximize = map(counting, originals)
        for epoch in range(steps):
            run.model.train()
            for images, labels in run.augmenter.epoch(0, epoch, settings.batch_size):
                counts.append(0)
                run.train_step(images, labels)
                if len(counts) == steps:
                    return counts
    finally:
        module.climb, module.maximize = originals
    return counts


def adversarial() -> Iterator[tuple[str, list[int]]]:
    """Kinks at all magnitudes, dense kinks, and weights that start outside the box."""
    shares = [i / 50 for i in range(1, 50)]
    kinks = -(10.0 ** torch.arange(0, 24, dtype=torch.float64))
    yield "24 kinks, each a tenth of the last", [_evaluations(kinks, share) for share in shares]
    dense = -10 / (torch.arange(1, 301, dtype=torch.float64) / 300) ** 3
    yield "300 kinks, dense near 0", [_evaluations(dense, share) for share in shares]
    outside = torch.full((50,), 3.0, dtype=torch.float64), torch.full((50,), 1e4).double()
    values, gradients = (
        torch.cat([outside[0], torch.zeros(1)]),
        torch.cat([outside[1], torch.ones(1)]),
    )
    yield (
        "50 weights outside the box",
        [_evaluations(gradients, share, values, lr=1e-3) for share in shares],
    )


def _evaluations(
    gradient: Tensor, share: float, value: Tensor | None = None, lr: float = 0.1
) -> int:
    """For a loss that is a ``share`` of the greatest decrease."""
    inside = value is None
    v = torch.zeros_like(gradient) if value is None else value.to(gradient)
    one = torch.ones((), dtype=gradient.dtype)
    most, _ = box_slope(one, v, gradient, lr, 0.0, -1.0, 1.0)
    loss = -share * most

    def slope(gamma: Tensor) -> tuple[Tensor, Tensor]:
        decrease, bend = box_slope(gamma, v, gradient, lr, 0.0, -1.0, 1.0)
        return loss + decrease, bend

    counter = Counted(slope)
    if inside:
        start = closed_form(loss, torch.zeros_like(loss), lr * gradient.square().sum(), 0.0)
        climb(counter, start)
    else:
        maximize(counter)
    return counter.calls


def _line(name: str, counts: list[int]) -> str:
    searched = [count for count in counts if count]
    middle = f"{statistics.median(searched):g}" if searched else ""
    return f"| {name} | {len(counts)} | {len(searched)} | {middle} | {max(counts)} |"

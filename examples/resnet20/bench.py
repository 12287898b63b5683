"""How long a training step takes, against the bare loop that every step contains."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import nets
from .command_line import default_net
from .data import Data
from .settings import Settings
from .training import Run

_PHASES = ("images", "forward", "loss", "backward", "step", "rest")
_WARM_UP = 5


def bench(settings: Settings, data: Data, steps: int) -> str:
    """Time ``steps`` steps of each net, in turns, and return the medians as Markdown.

    The bare loop is forward, backward and torch's SGD on the float net and a batch that is ready.
    The others are what an epoch does: crop, flip, loss, metrics, learning rate and ``settings``'
    optimizer. Taking turns keeps whatever else the machine does from favouring one of them.
    """
    bare_name = "bare float loop, SGD"
    runs = {f"{run.net}, {run.optimizer}": run for run in _runs(settings)}
    names = list(runs)
    clocks = {name: Clock(settings.device) for name in names}
    jobs = {bare_name: _bare(settings, data)} | {
        name: _epochs(run, data, clocks[name]) for name, run in runs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(_WARM_UP + steps):
        for name, job in jobs.items():
            _synchronize(settings.device)
            start = time.perf_counter()
            next(job)
            _synchronize(settings.device)
            if i >= _WARM_UP:
                times[name].append(time.perf_counter() - start)
            if name in clocks:
                clocks[name].end(start, counts=i >= _WARM_UP)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare, net, *_ = medians.values()
    epoch = len(data.train) // settings.batch_size
    lines = [
        f"{settings.device}, {settings.precision}, {torch.get_num_threads()} threads, batch "
        f"{settings.batch_size}, median of {steps} steps, {epoch} steps an epoch",
        "",
        "| | ms a step | s an epoch | of the bare loop | of the float net |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {1000 * value:.1f} | {epoch * value:.1f} | {value / bare:.2f} | "
        f"{value / net:.2f} |"
        for name, value in medians.items()
    ]
    lines += [
        "",
        f"| of which, ms | {' | '.join(_PHASES)} |",
        "|---|" + "---|" * len(_PHASES),
        *(f"| {name} | {' | '.join(clocks[name].medians())} |" for name in names),
    ]
    return "\n".join(lines)


class Clock:
    """Where the time of a training step goes, by what it calls: forward, loss, step."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[float] = []
        self._steps: list[list[float]] = []

    def watch(self, run: Run) -> None:
        """Note when ``run`` calls these, and when they return."""
        run.forward = self._marking(run.forward)
        run.criterion = self._marking(run.criterion)
        run.optimizer.step = self._marking(run.optimizer.step)  # type: ignore[method-assign]

    def end(self, start: float, counts: bool) -> None:
        """A step that began at ``start`` is over."""
        forward, scores, _, loss, step, moved = self._marks
        ends = (forward, scores, loss, step, moved, time.perf_counter())
        if counts:
            self._steps.append([end - begin for begin, end in itertools.pairwise((start, *ends))])
        self._marks = []

    def medians(self) -> list[str]:
        """Milliseconds of each phase."""
        phases = zip(*self._steps, strict=True)
        return [f"{1000 * statistics.median(phase):.1f}" for phase in phases]

    def _marking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*arguments: Any, **options: Any) -> Any:
            self._mark()
            result = function(*arguments, **options)
            self._mark()
            return result

        return marked

    def _mark(self) -> None:
        _synchronize(self._device)
        self._marks.append(time.perf_counter())


def _runs(settings: Settings) -> Iterator[Settings]:
    optimizer = settings.optimizer
    yield dataclasses.replace(
        settings, net="float", optimizer="sgd" if optimizer == "parq" else optimizer
    )
    for net in (default_net({"arch": settings.arch, "optimizer": optimizer}), "ternary"):
        yield dataclasses.replace(settings, net=net)


def _bare(settings: Settings, data: Data) -> Iterator[None]:
    device = torch.device(settings.device)
    model = nets.build("float", settings.shortcut, settings.seed, settings.arch).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    shape = (settings.batch_size, 3, 32, 32)
    images = torch.randn(shape).to(device, memory_format=torch.channels_last)
    labels = data.train.labels[: settings.batch_size].to(device)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if settings.compile else model
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp == "bf16"):
            scores = forward(images)
        loss = functional.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield


def _epochs(settings: Settings, data: Data, clock: Clock) -> Iterator[None]:
    run = Run(settings, data)
    clock.watch(run)
    for epoch in itertools.count():
        for _ in run.steps(epoch):
            yield


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

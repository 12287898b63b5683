"""Four kinds of network, each trained by DFW and by its usual optimizer, and one at many lr."""

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import CHECKPOINT, UserError, check_new, counted, interpreter, resumed, write
from torch import nn

from dfw_opt.dfw import LR

from . import training
from .data import load
from .report import Row, accuracies, draw, report
from .settings import PLACE, Settings

USUAL = {"float": "sgd", "binary": "adam", "ternary": "sgd", "xnor": "adam"}
SWEPT, FACTORS = "xnor", (1 / 30, 1 / 10, 1 / 3, 3, 10, 30)  # of the default lr
NAMES = {"sgd": "SGD", "adam": "Adam", "dfw": "DFW"}
# What the rows share; all else is a row's own.
BUDGET = ("epochs", "batch_size", "seed", "amp", "limit", "validate", "data", *PLACE)

Job = tuple[Settings, Path, float]  # lr is the default times the last


def run_table(given: dict[str, Any], out: Path, resume: bool) -> None:
    """Train what is not done yet, then print and save the table and its figure."""
    for name in given:
        if name not in BUDGET:
            raise UserError(f"--{name.replace('_', '-')} does not go with --table; leave it out")
    if resume:
        stored = asdict(resumed(Settings, out / "float-sgd", given, PLACE))
        given = {name: stored[name] for name in BUDGET if name not in PLACE} | given
    jobs = planned(given, out)
    for _, folder, _ in jobs if not resume else ():
        check_new(folder, "--out")
    settings = jobs[0][0]
    workers = min(given.get("threads", torch.get_num_threads()), 8)  # each takes some 400 MB
    data = load(settings.data, settings.limit, settings.validate)
    training.check(settings, data)
    epochs, rows = counted(settings.epochs, "epoch"), list[Row]()
    print(f"{len(jobs)} trainings of {epochs}, {workers} at a time:", flush=True)
    for row in finished(jobs, workers):
        rows.append(row)
        name = f"{row.net} {row.optimizer}" + f", lr x {row.factor:.2g}" * (row.factor != 1)
        print(f"{len(rows):2}  {name:24} {row.accuracies[-1]:5.1f} %", flush=True)
    default = [row for row in rows if row.factor == 1]
    swept = [row for row in rows if row.net == SWEPT and len(rows) > len(default)]
    swept.sort(key=lambda row: (row.optimizer, row.factor))
    conditions = (
        f"ResNet-20 on {data.name}: {len(data.train):,} training images, {epochs} of "
        f"{counted(rows[0].steps, 'step')}; accuracy on {len(data.held_out):,} "
        f"{data.held_out_name} images."
    )
    write(out / "table.md", (text := report(default, swept, conditions)).encode())
    draw(out / "table.png", default, swept)
    print(f"\n{text}\nThe text is in {out / 'table.md'}, a figure in {out / 'table.png'}.")
    if settings.data is None:
        print("Next, the same on CIFAR-10, which takes hours:")
        print(f"{interpreter()} {sys.argv[0]} --table --download --data data")


def planned(given: dict[str, Any], out: Path) -> list[Job]:
    """The default lr for all networks; on digits, where there is time, also others for one."""
    pairs = [(net, optimizer, 1.0) for net in USUAL for optimizer in (USUAL[net], "dfw")]
    if given.get("data") is None:
        given = {"epochs": 3} | given  # after many all are alike
        pairs += [(SWEPT, name, factor) for factor in FACTORS for name in (USUAL[SWEPT], "dfw")]
    jobs = []
    for net, optimizer, factor in pairs:
        settings = Settings.choose(given | {"net": net, "optimizer": optimizer, "threads": 1})
        if factor != 1:
            settings = replace(settings, lr=factor * (settings.lr or LR))
        folder = out / (f"{net}-{optimizer}" + f"-lr-x-{factor:.2g}" * (factor != 1))
        jobs.append((settings, folder, factor))
    return jobs


def finished(jobs: list[Job], workers: int) -> Iterator[Row]:
    """Do the jobs, by so many processes if there are to be several."""
    if workers == 1:
        yield from map(do, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # Ctrl-C goes to the workers too, who would print what it interrupts; they inherit this.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        rows = pool.map(do, jobs)
        signal.signal(signal.SIGINT, before)
        try:
            yield from rows
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def do(job: Job) -> Row:
    """Train, or go on."""
    settings, folder, factor = job
    run = training.Run(settings, load(settings.data, settings.limit, settings.validate))
    _, start = run.evaluate(run.model)
    if (folder / CHECKPOINT).exists():
        run.load(folder)
    run.save(folder)
    while row := run.advance():
        run.history.append(row)
        run.save(folder)
    path = folder / "network.packed"
    return Row(
        net=settings.net,
        optimizer=NAMES[settings.optimizer],
        factor=factor,
        accuracies=[round(x, 1) for x in (100 * start, *accuracies(run.history))],
        steps=run.steps_per_epoch,
        levels=levels(training.pack(run, path).blocks),
        bytes=path.stat().st_size,
        seconds=mean(row["seconds"] for row in run.history),
    )


def levels(blocks: nn.Module) -> str:
    """How many values the weights of a layer have; or, where these are more, those of a channel."""
    weights = [m.weight.detach() for m in blocks.modules() if isinstance(m, nn.Conv2d)]
    layer = max(len(torch.unique(w)) for w in weights)
    channel = max(len(torch.unique(c)) for w in weights for c in w)
    if channel > 16:
        return "any"
    return f"{channel} per channel" if channel < layer else f"{layer} per layer"

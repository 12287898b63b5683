"""Measure how long the steps of optimizers take, and their extra memory. No network runs.

    python step_speed.py
    python step_speed.py --sizes tiny resnet20 --threads 1 --compile --csv speed.csv

prints a table for each size. All optimizers take turns in one run, so that what else the machine
does favours none; times are to be read as ratios.
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import FrankWolfe, Parser, UserError, number, run, write_csv
from resnet20.nets import build
from torch import Tensor
from torch.autograd.profiler import profile
from torch.optim import SGD, AdamW, Muon, Optimizer

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

SIZES: dict[str, list[tuple[int, ...]]] = {
    "resnet20": [tuple(p.shape) for p in build("float", "resnet", 0).parameters()],
    "25M-many": [(510, 510)] * 96,
    "25M-few": [(2500, 2500)] * 4,
    "matrices": [(64, 64)] * 200,
    "tiny": [(8, 8)] * 3000,
}


def groups(params: list[Tensor]) -> list[dict[str, Any]]:
    """Matrices quantized, vectors float."""
    vectors = {"params": [p for p in params if p.dim() < 2], "quantizer": None, "radius": None}
    return [{"params": [p for p in params if p.dim() > 1]}, *[vectors] * bool(vectors["params"])]


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": lambda params: SGD(params, momentum=0.9, foreach=True),
    "AdamW foreach": lambda params: AdamW(params, foreach=True),
    "AdamW fused": lambda params: AdamW(params, fused=True),
    "Muon": Muon,
    "DFW euclidean": lambda params: DFW(params, norm="euclidean"),
    "DFW spectral": lambda params: DFW(params, norm="spectral"),
    "ProjectedDFW": lambda params: ProjectedDFW(groups(params)),
    "TernaryDFW": lambda params: TernaryDFW(groups(params)),
}


def steps(
    shapes: list[tuple[int, ...]], device: torch.device, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """A step of each optimizer, on weights of its own and the gradients of all."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, device=device) for shape in shapes]
    gradients = [torch.randn_like(weight) for weight in weights]
    loss = torch.ones((), device=device)
    result: dict[str, Callable[[], Any]] = {}
    for name, compile_it in itertools.product(OPTIMIZERS, (False, True)[: 1 + compiled]):
        pairs = [(w.clone(), gradient) for w, gradient in zip(weights, gradients, strict=True)]
        if name == "Muon":  # takes matrices only, so convolutions are flattened
            pairs = [(w.flatten(1), g.flatten(1)) for w, g in pairs if w.dim() > 1]
        for p, gradient in pairs:
            p.grad = gradient
        optimizer: Any = OPTIMIZERS[name]([p for p, _ in pairs])
        step = torch.compile(optimizer.step) if compile_it else optimizer.step
        given = {"loss": loss} if isinstance(optimizer, FrankWolfe) else {}
        result[name + " compiled" * compile_it] = partial(step, **given)
    return result


def measure(
    jobs: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each step, in turns, each round in another order."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    order = random.Random(0)
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else tuple
    for i in range(3 + rounds):
        for name in order.sample(list(jobs), len(jobs)):
            wait()
            start = time.perf_counter()
            jobs[name]()
            wait()
            if i >= 3:  # the first compile, and make state
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """How much more memory torch has in use at the peak of ``step`` than before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints that it runs
    with profile(profile_memory=True) as profiled:
        step()
    results: Any = profiled.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    # What is given back is negative.
    in_use = itertools.accumulate((int(event.nbytes()) for event in events), initial=0)
    return max(in_use)


def rows(size: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """What is measured of one size, a row for each optimizer."""
    jobs = steps(SIZES[size], device, options.compile)
    times = measure(jobs, device, options.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    found = []
    for name, job in jobs.items():
        row = {"size": size, "optimizer": name, "ms": medians[name]}
        row |= {"min": min(times[name]), "max": max(times[name])}
        row |= {f"of {it.split()[0]}": medians[name] / medians[it] for it in ("SGD", "AdamW fused")}
        found.append(row | {"extra MB": peak_bytes(job, device) / 1e6})
    return found


def report(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda cannot be used here; --device cpu always can")
    torch.set_num_threads(options.threads)
    done: list[dict[str, Any]] = []
    for size in options.sizes:
        print(f"\n{size}: {len(SIZES[size])} tensors, {device}, {options.threads} threads")
        for i, row in enumerate(rows(size, options, device)):
            _, name, *numbers = row.values()
            if i == 0:
                print(f"{'':26}" + "".join(f"{key:>10}" for key in [*row][2:]))
            print(f"{name:26}" + "".join(f"{x:10.3f}" for x in numbers), flush=True)
            done.append(row)
        if options.csv is not None:
            write_csv(options.csv, done)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(__doc__)
    add, count = parser.add_argument, number(int, least=1)
    add("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="default: all")
    add("--rounds", type=count, default=20, help="default: 20")
    add("--threads", type=count, default=torch.get_num_threads(), help="default: torch's")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--compile", action="store_true", default=False, help="also with each step compiled")
    add("--csv", type=Path, default=None, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    return run(lambda: report(options), lambda: "Sizes that were done are in --csv, if given.")


if __name__ == "__main__":
    sys.exit(main())

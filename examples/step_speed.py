"""Measure how long the steps of optimizers take, and the memory at their peak. No network runs.

    python step_speed.py
    python step_speed.py --sizes 1M --threads 1 --only dfw binary ternary

prints a table for each shape (ResNet-20's tensors, then each size as 96 matrices and as one), and
saves all of them as CSV and a picture. "cap" is a step with γ = 1, the usual case in training
quantized networks; "search" one with a loss so small that γ lies between 0 and 1.

    python step_speed.py --evaluations 200

counts instead how often that search evaluates its slope, in training and on inputs made to be hard.
"""

import argparse
import contextlib
import gc
import os
import re
import sys
from pathlib import Path

from resnet20.command_line import INTERRUPTED, Parser, fail, missing, whole
from resnet20.errors import UserError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number such as 500k or 25M, not {text!r}")
    value = int(float(match[1]) * _UNITS[match[2]])
    if value < 1000:
        raise argparse.ArgumentTypeError(f"must be at least 1k, not {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = out.add_argument
    add(
        "--sizes",
        type=_size,
        nargs="*",
        default=[10**6, 25 * 10**6, 100 * 10**6],
        metavar="N",
        help="numbers of parameters, beside ResNet-20 (default: 1M 25M 100M; none is none)",
    )
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help="optimizers to measure, beside adamw-fused and sgd-foreach (default: all)",
    )
    add("--repeats", type=whole(2), default=20, help="steps that are timed (default: 20)")
    add("--threads", type=whole(1), help="on the cpu (default: torch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--evaluations", type=whole(1), metavar="STEPS", help="count these, in so many steps")
    add("--data", type=Path, metavar="DIR", help="CIFAR-10, for --evaluations (default: digits)")
    add(
        "--out",
        type=Path,
        default=Path("runs/step-speed"),
        metavar="DIR",
        help="default: %(default)s",
    )
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no γ shows a question mark
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # The profiler, which counts allocations, would otherwise say so each time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        (_count if given.evaluations else _run)(given)
    except ModuleNotFoundError as error:
        return missing(error)
    except UserError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print(f"Interrupted. Shapes that were done are in {given.out}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _count(given: argparse.Namespace) -> None:
    import torch
    from stepspeed import evaluations

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    for line in evaluations.table(given.data, given.evaluations):
        print(line, flush=True)


def _run(given: argparse.Namespace) -> None:
    import torch
    from resnet20.files import make_directory
    from stepspeed import contenders, measure, report, shapes

    names = [contender.name for contender in contenders.CONTENDERS]
    for name in given.only or ():
        if name not in names:
            raise UserError(f"--only: there is no {name!r}; choose from {' '.join(names)}")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda cannot be used here; --device cpu always can")
    for file in (report.TABLE, report.FIGURE):
        if (given.out / file).exists():
            raise UserError(f"{given.out} already holds a {file}; choose another --out")
    make_directory(given.out)
    if given.threads is not None:
        torch.set_num_threads(given.threads)

    chosen = contenders.choose(given.only)
    place = report.surroundings(device)
    print(
        f"{place['device']}, {place['threads']} threads, torch {place['torch']}, steps of dfw_opt "
        f"by {place['kernels']} kernels; median and quartiles of {given.repeats} steps"
    )
    rows: list[report.Row] = []
    for shape in shapes.shapes(given.sizes):
        needed, free = measure.needed_bytes(shape, chosen), shapes.available_bytes(device)
        if free is not None and needed > free:
            print(
                f"\n{shape.name}: left out, as it needs about {report.size(needed)} of memory and "
                f"{report.size(free)} are available",
                flush=True,
            )
            continue
        print(
            f"\n{shape.name}: {shape.parameters:,} parameters, tensors: {len(shape.dimensions)}",
            flush=True,
        )
        jobs = measure.measure(shape, chosen, device, given.repeats)
        new = report.rows(shape, jobs, device)
        rows += new
        report.write_table(given.out, rows)  # so that an interruption loses one shape only
        print(f"\n{report.markdown(new)}", flush=True)
        for job, row in zip(jobs, new, strict=True):
            if job.strays:
                print(
                    f"{report.label(row)}: γ was not as wanted in {job.strays} of {given.repeats} "
                    f"steps, but from {row['gamma_min']:.3g} to {row['gamma_max']:.3g}"
                )
        del jobs
        gc.collect()
    if not rows:
        raise UserError("there is not enough memory for any shape; try --only with few optimizers")
    picture = report.write_figure(given.out, rows)
    print(f"\ntable {given.out / report.TABLE}, figure {picture}")


if __name__ == "__main__":
    sys.exit(main())

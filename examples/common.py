"""What the examples share: reading a command line, failing, a training step, and checkpoints."""

import argparse
import io
import math
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from dfw_opt import DFW, AveragedModel, ProjectedDFW, TernaryDFW

CHECKPOINT = "checkpoint.pt"
# Of the processes that torchrun starts, the first; and none that a process of ours starts.
LEADS = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
FrankWolfe = DFW | ProjectedDFW | TernaryDFW

N = TypeVar("N", int, float)
S = TypeVar("S")


class UserError(Exception):
    """What the user can put right; it is printed without a traceback."""


class Parser(argparse.ArgumentParser):
    """What is not given stays out of the result, and an error is one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def number(kind: type[N], least: float, below: float = math.inf) -> Callable[[str], N]:
    """The type of an option that is a number within these bounds."""

    def convert(given: str) -> N:
        value = kind(given)
        if not least <= value < below:
            end = f" and below {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be at least {least:g}{end}, not {given}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def run(job: Callable[[], object], after_interrupt: Callable[[], str]) -> int:
    """Do ``job`` and return the exit code: 2 if the user has to change something."""
    try:
        job()
    except KeyboardInterrupt:
        if LEADS:
            print(f"Interrupted. {after_interrupt()}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = "peers" if str(error.name).startswith("torchao") else "examples"
        message = (
            f"the Python package {error.name} is missing; in a copy of the repository run: "
            f"{interpreter()} -m pip install '.[{extra}]'"
        )
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error}; check that path and the space on its disk"
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return 2


def interpreter() -> str:
    """The Python that runs this, as one would type it here."""
    path, here = Path(sys.executable), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def how_to_resume(out: Path, *more: str) -> str:
    """What to type to go on with the run in ``out``."""
    if not out.exists():
        return "Nothing was begun; run the same command again."
    torchrun = []
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
    words = shlex.join([*torchrun, sys.argv[0], "--out", str(out), "--resume", *more])
    return f"To go on: {interpreter()} {words}"


def say(text: str) -> None:
    """Print, once for all processes."""
    if LEADS:
        print(text, flush=True)


def counted(count: int, what: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def resumed(kind: type[S], out: Path, given: dict[str, Any], place: Iterable[str]) -> S:
    """The settings of the run in ``out``; only the ``place`` may be another on the command line."""
    stored = load_checkpoint(out)["settings"]
    for name, value in given.items():
        if name not in place and value != stored.get(name):
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the run to resume has {stored.get(name)}; "
                "leave the option out or choose another --out"
            )
    return kind(**(stored | given))


def write(path: Path, content: bytes) -> None:
    """Write a file that is whole at any time, even if this is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows; a cell is empty where its column does not apply."""
    lines = [",".join(row) for row in rows[:1]]  # the names of the columns
    lines += [",".join("" if x != x else str(x) for x in row.values()) for row in rows]
    write(path, "".join(f"{line}\n" for line in lines).encode())


def load_checkpoint(out: Path, device: str = "cpu") -> dict[str, Any]:
    """Read the checkpoint in ``out``."""
    path = out / CHECKPOINT
    if not path.is_file():
        raise UserError(f"--resume: there is no {path}; leave --resume out to start")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"--resume: {path} cannot be read; choose another --out") from error
    return state


def check_new(path: Path, name: str) -> None:
    """Nothing that a run has left behind is overwritten."""
    if path.is_file() or (path / CHECKPOINT).exists():
        raise UserError(f"{name} {path} already exists; choose another, or add --resume")


class Run:
    """A network in training, its optimizers, the average of its weights, and the history."""

    describe: Callable[[], str]  # what is about to be trained, in one line
    advance: Callable[[], dict[str, float]]  # to the next evaluation; nothing when all is done

    def __init__(self, settings: Any, model: nn.Module, optimizers: list[Any]) -> None:
        self.model, self.optimizers = model, optimizers
        self.rates = [group["lr"] for group in self.groups()]
        self.settings = replace(settings, lr=self.rates[0])  # on record, if it was the optimizer's
        self.average = averaged(model, optimizers[0]) if settings.average else None
        self.history: list[dict[str, float]] = []

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups, whose ``lr`` a schedule changes."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, loss: Tensor, done: float) -> Tensor:
        """The step that ``loss`` leads to, with this share of the run done; return γ."""
        for group, rate in zip(self.groups(), self.rates, strict=True):
            group["lr"] = rate * lr_factor(self.settings.schedule, done)
        gamma = torch.full_like(loss, math.nan)
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            if isinstance(optimizer, FrankWolfe):
                optimizer.step(loss=loss)
                gamma = optimizer.gamma.to(loss)
            else:
                optimizer.step()
        self.after_step(done)
        if self.average is not None:
            self.average.update_parameters(self.model)
        return gamma

    def after_step(self, done: float) -> None:
        """What else there is to do before weights are averaged."""

    @property
    def result(self) -> nn.Module:
        """What the training is for: the average if there is one, else the network itself."""
        return self.model if self.average is None else self.average.module

    def train(self, out: Path, resume: bool) -> None:
        """Train to the end, leaving a checkpoint and the metrics in ``out``."""
        if resume:
            self.load(out)
        elif LEADS:
            self.save(out)
        say(self.describe())
        while row := self.advance():
            self.history.append(row)
            if LEADS:
                self.save(out)
            say("  ".join(f"{name.replace('_', ' ')} {x:.4g}" for name, x in row.items() if x == x))
        say(f"metrics.csv and {CHECKPOINT} are in {out}")

    def save(self, out: Path) -> None:
        """Write all that decides how the run goes on, and the metrics."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": None if self.average is None else self.average.state_dict(),
            "history": self.history,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(out / CHECKPOINT, buffer.getvalue())
        write_csv(out / "metrics.csv", self.history)

    def load(self, out: Path) -> None:
        """Go to where `save` was called, in a run that has not begun."""
        state = load_checkpoint(out, str(next(self.model.parameters()).device))
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.history = list(state["history"])


def averaged(model: nn.Module, optimizer: Any) -> swa_utils.AveragedModel:
    """The average over about the last tenth of all steps; of latents, where weights have some."""
    if isinstance(optimizer, FrankWolfe):
        return AveragedModel(model, optimizer)
    return swa_utils.AveragedModel(
        model, avg_fn=lambda mean, new, count: mean.lerp(new, 10 / (count + 10))
    )


def lr_factor(schedule: str, done: float) -> float:
    """By what lr is multiplied when this share of the run is done; needs no state to resume."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    drops = {"none": (), "step": (0.5, 0.75), "parq": (0.4, 0.6, 0.75)}[schedule]
    return 0.1 ** sum(done >= drop for drop in drops)

"""One run: the loop, what it measures, and how it is stopped and resumed."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, files, nets, report
from .augment import Augmenter
from .average import Average
from .data import Data
from .distributed import ALONE, Team
from .errors import UserError
from .meter import Meter
from .optimizers import FrankWolfe, attach, criterion
from .progress import EpochBar
from .schedule import learning_rate, relaxation
from .settings import Settings
from .straight_through import layers
from .watch import WeightWatch

_EVALUATION_BATCH = 500
_BATCHES_FOR_NORMS = 50
_COMPILER = ("torch._dynamo", "torch._inductor")


class Run:
    """A network in training, its optimizer, and the history of both."""

    def __init__(self, settings: Settings, data: Data, team: Team = ALONE) -> None:
        if settings.batch_size > len(data.train):
            raise UserError(
                f"--batch-size {settings.batch_size} is more than the {len(data.train)} training "
                "images; make it smaller"
            )
        if settings.batch_size < team.size:
            raise UserError(
                f"--batch-size {settings.batch_size} is less than the {team.size} processes that "
                "share it; make it larger"
            )
        if settings.compile and team.size > 1:  # which would stop at each norm that they share
            raise UserError("--compile is for one process; start it without torchrun")
        if settings.average is not None and team.size > 1:
            raise UserError("--average is for one process; start it without torchrun")
        if settings.float_epochs and team.size > 1:
            raise UserError("--float-epochs is for one process; start it without torchrun")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if settings.device.startswith("cuda"):
            torch.backends.cudnn.deterministic = True
        self.settings = settings
        self.data = data
        self.team = team
        self.device = team.device(settings.device)
        self.augmenter = Augmenter(data, self.device)
        self._held_out_images = data.held_out.images.to(self.device)
        self._held_out_labels = data.held_out.labels.to(self.device)
        model = nets.build(settings.net, settings.shortcut, settings.seed, settings.arch)
        self.model = model.to(self.device)
        team.share_statistics(self.model)
        self.criterion = criterion(settings)
        self.history: list[report.Row] = []
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        """Make the optimizer that trains from this epoch on, and all that follows from it."""
        settings = self.settings.at(epoch)
        self.optimizer = attach(self.model, settings, settings.epochs * self.steps_per_epoch)
        self._layers = layers(self.model)
        self.average: Average | None = None
        if settings.average is not None:
            self.average = Average(self.model, self.optimizer, settings.average)
        self._alone: Callable[[Tensor], Tensor] = self.model
        if settings.compile:
            self._alone = torch.compile(self.model)
        self.forward = self.team.parallel(self._alone)
        self.watch = WeightWatch(self.model, self.optimizer)

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train) // self.settings.batch_size

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on one batch; return the loss and the number of correct answers.

        Each process of a team gives its part of the batch, and is told about the whole.
        """
        scores = self._scores(images, self.forward)
        loss = self.team.weigh(self.criterion(scores, labels), self.settings.batch_size)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(self.optimizer, FrankWolfe):
            self.optimizer.step(loss=loss)
        else:
            self.optimizer.step()
            for layer in self._layers:
                layer.clip()
        if self.average is not None:
            self.average.update()
        correct = (scores.detach().argmax(1) == labels).sum()
        return self.team.mean(loss.detach()), self.team.total(correct)

    def steps(self, epoch: int) -> Iterator[Meter]:
        """Train for the epoch with this number (from 0); after each step yield its meter so far."""
        settings, count = self.settings, self.steps_per_epoch
        meter = Meter(self.device)
        self.model.train()
        size = settings.batch_size
        batches = self.augmenter.epoch(settings.seed, epoch, size, self.team.rows(size))
        for i, (images, labels) in enumerate(batches, epoch * count):
            lr = learning_rate(settings.schedule, settings.lr, i, settings.epochs * count)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss, correct = self.train_step(images, labels)
            if settings.relax and isinstance(self.optimizer, FrankWolfe):
                self.optimizer.relax(relaxation(settings.relax, i, settings.epochs * count))
            meter.add(loss, correct, size, getattr(self.optimizer, "gamma", None))
            yield meter

    def train_epoch(self) -> report.Row:
        """Train for one epoch, evaluate, and add a row to the history."""
        if 0 < self.epoch == self.settings.float_epochs:
            self._begin(self.epoch)
        skipped_before = self._skipped()
        start = time.perf_counter()
        title = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        with EpochBar(title, self.steps_per_epoch, self.team.leads) as bar:
            for meter in self.steps(self.epoch):
                bar.advance(meter)
        train_loss, train_accuracy, gamma = meter.read()
        seconds = time.perf_counter() - start
        held_out_loss, held_out_accuracy = self.evaluate()
        row = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "held_out_loss": held_out_loss,
            "held_out_accuracy": held_out_accuracy,
            "gamma_mean": gamma,
            "at_bound": self.watch.at_bound(),
            "flip_rate": self.watch.flip_rate(),
            "seconds": seconds,
            "skipped_steps": self._skipped() - skipped_before,
        }
        if self.average is not None:
            loss, accuracy = self._evaluate_average(self.average)
            row |= {"average_loss": loss, "average_accuracy": accuracy}
        self.history.append(row)
        return row

    @torch.no_grad()
    def evaluate(self, model: nn.Module | None = None) -> tuple[float, float]:
        """Loss and accuracy on the held-out images, of the network in training or of ``model``.

        The processes of a team share the work on the network in training.
        """
        (model or self.model).eval()
        forward, team = (self._alone, self.team) if model is None else (model, ALONE)
        meter = Meter(self.device)
        batches = range(0, len(self._held_out_labels), _EVALUATION_BATCH)
        for first in batches[team.rank :: team.size]:
            batch = slice(first, first + _EVALUATION_BATCH)
            labels = self._held_out_labels[batch]
            scores = self._scores(self.augmenter.normalise(self._held_out_images[batch]), forward)
            correct = (scores.argmax(1) == labels).sum()
            meter.add(self.criterion(scores, labels), correct, len(labels))
        meter.join(team)
        loss, accuracy, _ = meter.read()
        return loss, accuracy

    @property
    def result(self) -> nn.Module:
        """What the training is for: the average if there is one, else the network itself."""
        return self.model if self.average is None else self.average.model

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the run goes on."""
        return {
            "settings": self.settings.to_dict(),
            "data": self.data.digest,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was called, in a run that has not begun."""
        if state["data"] != self.data.digest:
            raise UserError(
                "the run to resume was on other images; give the --data that it began with"
            )
        if 0 < self.settings.float_epochs < len(state["history"]):
            self._begin(self.settings.float_epochs)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                "the checkpoint is from another version of this example; choose another --out"
            ) from error
        self.history = list(state["history"])
        self.watch = WeightWatch(self.model, self.optimizer)

    def _evaluate_average(self, average: Average) -> tuple[float, float]:
        # Of images as they were in this epoch. Drawing them again touches no other randomness.
        settings = self.settings
        batches = self.augmenter.epoch(settings.seed, self.epoch, settings.batch_size)
        with self._autocast():
            average.estimate_norms(itertools.islice(batches, _BATCHES_FOR_NORMS))
        return self.evaluate(average.model)

    def _autocast(self) -> torch.autocast:
        amp = self.settings.amp == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=amp)

    def _scores(self, images: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        try:
            with self._autocast():
                return forward(images)
        except RuntimeError as error:
            if self.settings.compile and type(error).__module__.startswith(_COMPILER):
                raise UserError(
                    "--compile does not work here, most likely for want of a C++ compiler; "
                    "leave it out"
                ) from error
            raise

    def _skipped(self) -> float:
        if not isinstance(self.optimizer, FrankWolfe):
            return math.nan
        skipped = self.optimizer.skipped_steps
        return 0 if skipped is None else int(skipped)


def train(settings: Settings, data: Data, out: Path, resume: bool, team: Team = ALONE) -> Run:
    """Train to the end, leaving a checkpoint, the metrics and the curves in ``out``."""
    run = Run(settings, data, team)
    if resume:
        run.load_state_dict(checkpoint.load(out, settings.device))
    if not team.leads:  # the files and the lines of text are for one process to write
        while run.epoch < settings.epochs:
            run.train_epoch()
        return run
    files.make_directory(out)
    files.clear_leftovers(out, (checkpoint.NAME, report.METRICS, report.CURVES))
    if not resume:
        checkpoint.save(out, run.state_dict())
    print(describe(run), flush=True)
    while run.epoch < settings.epochs:
        row = run.train_epoch()
        checkpoint.save(out, run.state_dict())
        report.write_metrics(out, run.history, data.held_out_name)
        print(report.epoch_line(row, settings.epochs, data.held_out_name), flush=True)
    metrics = report.write_metrics(out, run.history, data.held_out_name)
    title = f"{settings.net} {nets.ARCHES[settings.arch]}, {settings.optimizer}, {data.name}"
    curves = report.write_curves(out, run.history, title, data.held_out_name)
    print(report.last_line(run.history, data.held_out_name))
    print(f"metrics {metrics}, curves {curves}, checkpoint {out / checkpoint.NAME}", flush=True)
    return run


def describe(run: Run) -> str:
    """What is about to be trained, in one line."""
    settings = run.settings
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    shortcuts = f", {settings.shortcut} shortcuts" if settings.arch == "resnet20" else ""
    average = f", average {settings.average:g}" if settings.average is not None else ""
    first = f", first {settings.float_epochs} epochs float" if settings.float_epochs else ""
    first += f", relaxed for {settings.relax:.0%} of the run" if settings.relax else ""
    together = f", {run.team.size} processes" if run.team.size > 1 else ""
    done = f"; {run.epoch} of {settings.epochs} epochs done" if run.epoch else ""
    return (
        f"{settings.net} {nets.ARCHES[settings.arch]} ({parameters:,} parameters{shortcuts}), "
        f"{settings.optimizer}, lr {settings.lr:g}, {settings.loss_name} loss{average}{first}; "
        f"{run.data.name}, {len(run.data.train):,} training and {len(run.data.held_out):,} "
        f"{run.data.held_out_name} images; {settings.device}, "
        f"{settings.precision}{together}{done}"
    )

"""One run: the loop, what it measures, and how it is stopped and resumed."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from resnet20 import checkpoint, files
from resnet20.errors import UserError
from torch import Tensor, nn
from torch.nn import functional

from . import net, report
from .optimizers import FrankWolfe, attach
from .schedule import factor
from .settings import Settings
from .text import Text

_EVALUATION_BATCH = 64


class Run:
    """A network in training, its optimizer, and the history of both."""

    def __init__(self, settings: Settings, text: Text) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.text = text
        self.model = net.build(len(text.alphabet), settings.seed)
        self.optimizer = attach(self.model, settings)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[report.Row] = []

    @property
    def step(self) -> int:
        """How many steps are done, as far as a checkpoint knows."""
        return int(self.history[-1]["step"]) if self.history else 0

    def train_step(self, step: int) -> tuple[Tensor, Tensor]:
        """The step with this number (from 0); return its loss and γ."""
        settings = self.settings
        multiple = factor(settings.schedule, settings.warmup, step, settings.steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * multiple
        batch = self.text.batch(settings.seed, step, settings.batch_size, self.model.context)
        loss = self._loss(*batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(self.optimizer, FrankWolfe):
            self.optimizer.step(loss=loss)
            return loss.detach(), self.optimizer.gamma
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        return loss.detach(), torch.tensor(math.nan)

    def train(self) -> report.Row:
        """Train up to the next evaluation, evaluate, and add a row to the history."""
        start = time.perf_counter()
        last = min(self.step + self.settings.evaluate_every, self.settings.steps)
        done = [self.train_step(step) for step in range(self.step, last)]
        losses, gammas = (torch.stack(values) for values in zip(*done, strict=True))
        seconds = time.perf_counter() - start
        row = {
            "step": last,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": losses.mean().item(),
            "val_loss": self.evaluate(),
            "gamma_mean": gammas.mean().item(),
            "at_bound": self.at_bound(),
            "seconds": seconds,
        }
        self.history.append(row)
        return row

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the validation text."""
        inputs, targets = self.text.validation_windows(self.model.context)
        windows = torch.arange(len(inputs)).split(_EVALUATION_BATCH)  # type: ignore[no-untyped-call]
        return sum(float(self._loss(inputs[i], targets[i])) * len(i) for i in windows) / len(inputs)

    @torch.no_grad()
    def at_bound(self) -> float:
        """The share of latents at a bound of their box; NaN if there is no box."""
        beyond = [
            self.optimizer.state[p]["latent"].abs() >= group["radius"]
            for group in self.optimizer.param_groups
            if group.get("quantizer") is not None
            for p in group["params"]
        ]
        if not beyond:
            return math.nan
        return float(torch.cat([part.flatten() for part in beyond]).float().mean())

    def sample(self, length: int) -> str:
        """Text that the network makes up, from the first character of the validation text on."""
        start = self.text.validation[:1]
        return self.text.decode(net.sample(self.model, start, length, self.settings.seed))

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the run goes on."""
        return {
            "settings": self.settings.to_dict(),
            "data": self.text.digest,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        if state["data"] != self.text.digest:
            raise UserError(
                "the run to resume was on another text; use the Python version that it began with"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                "the checkpoint is from another version of this example; choose another --out"
            ) from error
        self.history = list(state["history"])

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())


def train(settings: Settings, text: Text, out: Path, resume: bool) -> Run:
    """Train to the end, leaving a checkpoint and the metrics in ``out``."""
    run = Run(settings, text)
    if resume:
        run.load_state_dict(checkpoint.load(out))
    files.make_directory(out)
    files.clear_leftovers(out, (checkpoint.NAME, report.METRICS))
    if not resume:
        checkpoint.save(out, run.state_dict())
    print(describe(run), flush=True)
    while run.step < settings.steps:
        row = run.train()
        checkpoint.save(out, run.state_dict())
        report.write_metrics(out, run.history)
        print(report.line(row, settings.steps), flush=True)
    metrics = report.write_metrics(out, run.history)
    print(f"metrics {metrics}, checkpoint {out / checkpoint.NAME}", flush=True)
    return run


def describe(run: Run) -> str:
    """What is about to be trained, and on what."""
    settings, text = run.settings, run.text
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    done = f"; {run.step} of {settings.steps} steps done" if run.step else ""
    return (
        f"Python's manual, {len(text.train):,} characters to train on and "
        f"{len(text.validation):,} for validation, {len(text.alphabet)} different ones, "
        f"sha256 {text.digest[:16]}\n"
        f"{settings.net} transformer ({parameters:,} parameters), {settings.optimizer}, "
        f"lr {settings.lr:g}, batches of {settings.batch_size} x {run.model.context}{done}\n"
        f"loss in nats a character: {math.log(len(text.alphabet)):.3f} for a guess, "
        f"{text.unigram_loss:.3f} from frequencies alone"
    )

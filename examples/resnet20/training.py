"""One run: the loop, what it measures, how it is stopped, resumed and exported."""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import common
import torch
import torch.distributed as dist
from common import LEADS, UserError, counted, say
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from dfw_opt import load_packed, save_packed

from . import straight_through
from .data import Batches, Data, load
from .nets import Network, build
from .optimizers import attach, criterion
from .report import accuracies
from .settings import Settings

# torchrun says which process this is, and of how many.
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
EVALUATION_BATCH = 500
BATCHES_FOR_NORMS = 50


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has."""
    if RANKS == 1:
        yield
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if 0 < gpus <= local:
        raise UserError(f"--nproc-per-node: there are only {counted(gpus, 'GPU')}; lower it")
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    yield
    meet()  # none leaves while another still talks
    dist.destroy_process_group()


def meet() -> None:
    """Wait for all processes."""
    if RANKS > 1:
        dist.barrier()


class Run(common.Run):
    """One training on images."""

    def __init__(self, settings: Settings, data: Data) -> None:
        check(settings, data)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.data, self.device = data, torch.device(settings.device)
        self.batches = Batches(data, self.device)
        self.steps_per_epoch = len(data.train) // settings.batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        model = build(settings.net, settings.shortcut, settings.seed, settings.arch)
        if RANKS > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        model.to(self.device)
        super().__init__(settings, model, attach(model, settings, self.steps))
        self.criterion = criterion(settings)
        self.forward: Callable[[Tensor], Tensor] = model
        if RANKS > 1:  # backward() averages the gradients over the processes
            self.forward = DistributedDataParallel(model)

    def train_step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """The step with this number (from 0); return loss, accuracy and γ."""
        scores = self.scores(self.forward, images)
        loss = self.criterion(scores, labels)
        gamma = self.step(loss, step / self.steps)
        accuracy = (scores.detach().argmax(1) == labels).float().mean()
        return torch.stack((loss.detach(), accuracy, gamma))

    def describe(self) -> str:
        settings, data, epochs = self.settings, self.data, len(self.history)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{settings.net} {settings.arch} ({parameters:,} parameters); {settings.optimizer}, "
            f"lr {self.rates[0]:g}, {settings.loss} loss; {data.name}, {len(data.train):,} "
            f"training and {len(data.held_out):,} {data.held_out_name} images; {settings.device}"
            + f", {RANKS} processes" * (RANKS > 1)
            + f"; {epochs} of {counted(settings.epochs, 'epoch')} done" * (epochs > 0)
        )

    def after_step(self, done: float) -> None:
        """Keep the latents of the baselines in their box; lower the relaxation."""
        for module in self.model.modules():
            if isinstance(module, straight_through.LatentConv2d):
                module.clip()
        if self.settings.relax:  # from 1 evenly to 0
            self.optimizers[0].relax(max(0.0, 1 - (done + 1 / self.steps) / self.settings.relax))

    def advance(self) -> dict[str, float]:
        """Train for one epoch and evaluate."""
        settings, epoch = self.settings, len(self.history)
        if epoch == settings.epochs:
            return {}
        skipped, start = self.skipped(), time.perf_counter()
        self.model.train()
        batches: Iterable[tuple[Tensor, Tensor]] = self.batches.epoch(
            settings.seed, epoch, settings.batch_size, RANK, RANKS
        )
        if LEADS and sys.stderr.isatty():
            title = f"epoch {epoch + 1}/{settings.epochs}"
            batches = tqdm(batches, title, self.steps_per_epoch, leave=False)
        first = epoch * self.steps_per_epoch
        # Values stay on the device until the end: reading one would make each step wait.
        values = torch.stack([self.train_step(i, *batch) for i, batch in enumerate(batches, first)])
        if RANKS > 1:
            dist.all_reduce(values)
            values /= RANKS
        loss, accuracy, gamma = values.where(values.isfinite(), math.nan).nanmean(0).tolist()
        row = {
            "epoch": epoch + 1,
            "lr": self.groups()[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            "gamma_mean": gamma,
            "seconds": time.perf_counter() - start,
            "skipped_steps": self.skipped() - skipped,
        }
        name = self.data.held_out_name
        row[f"{name}_loss"], row[f"{name}_accuracy"] = self.evaluate(self.model)
        if self.average is not None:
            # BatchNorm's running statistics are those of other weights: measure them anew, on the
            # images of this epoch, which touches no other randomness.
            again = self.batches.epoch(settings.seed, epoch, settings.batch_size)
            update_bn(itertools.islice(again, BATCHES_FOR_NORMS), self.result)
            row["average_loss"], row["average_accuracy"] = self.evaluate(self.result)
        return row

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy of ``model`` on the held-out images."""
        model.eval()
        held_out, sums = self.data.held_out, torch.zeros(2, device=self.device)
        for first in range(0, len(held_out), EVALUATION_BATCH):
            part = held_out.part(first, first + EVALUATION_BATCH)
            images, labels = part.images.to(self.device), part.labels.to(self.device)
            scores = self.scores(model, self.batches.normalise(images))
            correct = (scores.argmax(1) == labels).sum()
            sums += torch.stack((self.criterion(scores, labels) * len(labels), correct))
        loss, accuracy = (sums / len(held_out)).tolist()
        return loss, accuracy

    def skipped(self) -> float:
        """How many steps changed nothing, as a loss or gradient was not finite."""
        return float(getattr(self.optimizers[0], "skipped_steps", math.nan) or 0)

    def scores(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        amp = self.settings.amp == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            return model(images)


def check(settings: Settings, data: Data) -> None:
    """Refuse what the data, the machine or the number of processes do not allow."""
    size, device = settings.batch_size, settings.device
    if size > (images := len(data.train)):
        raise UserError(f"--batch-size {size} is more than the {images} training images; lower it")
    if size % RANKS:
        raise UserError(f"--batch-size {size} must be a multiple of the {RANKS} processes")
    if RANKS > 1 and device not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is for one process; leave it out")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here; write --device cpu") from error


def load_data(settings: Settings) -> Data:
    """The images that the settings ask for."""
    if settings.data is None:
        say("On scikit-learn's digits; for CIFAR-10 add: --download --data data")
    return load(settings.data, settings.limit, settings.validate)


def train(settings: Settings, data: Data, out: Path, resume: bool = False) -> Run:
    """Train to the end."""
    run = Run(settings, data)
    run.train(out, resume)
    accuracy, epochs = accuracies(run.history)[-1], counted(settings.epochs, "epoch")
    whose = " of the average" if settings.average else ""
    say(f"{data.held_out_name} accuracy{whose} {accuracy:.2f} % after {epochs}")
    return run


def pack(run: Run, path: Path) -> Network:
    """Write the trained network as a packed file, and read it back into a plain float network."""
    its = run.settings
    plain, reloaded = (build(its.net, its.shortcut, seed, its.arch) for seed in (0, 1))
    plain.load_state_dict(straight_through.plain_state(run.result))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_packed(plain, path)
    return load_packed(reloaded, path).to(run.device)


def export(run: Run, path: Path) -> str:
    """Write the trained network as a packed file, and say how small and how good it is."""
    reloaded = pack(run, path)
    _, accuracy = run.evaluate(reloaded)
    floats, size = 4 * sum(p.numel() for p in reloaded.parameters()), path.stat().st_size
    return (
        f"exported {path}: {size:,} bytes, {floats / size:.1f} times smaller than float32; "
        f"{run.data.held_out_name} accuracy after reloading {100 * accuracy:.2f} %"
    )

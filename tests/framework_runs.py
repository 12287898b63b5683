"""A small training, by hand and by each framework, for test_frameworks.py."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from helpers import everything, fingerprint
from lightning.pytorch import callbacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dfw_opt import DFW, AveragedModel, ProjectedDFW, TernaryDFW, param_groups

KINDS: dict[str, Any] = {"float": DFW, "binary": ProjectedDFW, "ternary": TernaryDFW}
BATCH, BATCHES = 8, 22
"""With two batches a step 11 steps; with four 6, of which the last has only two."""


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * BATCHES, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def loader() -> DataLoader[Any]:
    """In order."""
    return DataLoader(data(), BATCH)


class Net(nn.Module):
    """A model that returns its loss, like those of transformers, or scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = (nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24, bias=False))
        self.layers = nn.Sequential(
            nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), *hidden, nn.Linear(24, 4)
        )
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.layers(x)
        return {"loss": self.criterion(scores, labels), "logits": scores}


class ToldNet(Net):
    """One that Trainer tells the number of items of a step, as models of transformers are."""

    items = 1

    def forward(
        self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        scores = self.layers(x)
        if labels is None:
            return {"logits": scores}
        items = self.items if num_items_in_batch is None else num_items_in_batch
        loss = nn.functional.cross_entropy(scores, labels, reduction="sum") / items
        return {"loss": loss, "logits": scores}


class MeanOverItems(nn.Module):
    """A ``compute_loss_func`` that is a module, so that it can be watched."""

    def forward(self, outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return torch.div(loss, num_items_in_batch)


@dataclass
class Run:
    """What is trained, and what happened."""

    net: Net
    optimizer: Any
    averaged: Any = None
    gammas: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer.register_step_post_hook(
            lambda optimizer, *_: self.gammas.append(float(optimizer.gamma))
        )

    def average(self, **settings: Any) -> None:
        self.averaged = AveragedModel(self.net, self.optimizer, **settings)

    def bits(self) -> Any:
        """All that a run leaves, to be compared bit for bit."""
        params, state, _, height = everything(self.optimizer)
        states = [fingerprint(dict(model.state_dict())) for model in (self.net, self.averaged)]
        return self.gammas, params, state, height, states


def start(kind: str, norm: str = "spectral", late: bool = False, net: Net | None = None) -> Run:
    """``late``: without the second of the two weights that are quantized."""
    net = net or Net()
    groups = param_groups(net)
    if late:
        for key in ("params", "param_names"):
            groups[0][key] = groups[0][key][:1]
    lr = {"spectral": 1.0, "euclidean": 10.0}[norm]
    return Run(net, KINDS[kind](groups, lr=lr, norm=norm))


def late_group(net: Net) -> dict[str, Any]:
    return {"params": [net.layers[5].weight], "param_names": ["layers.5.weight"]}


def by_hand(
    run: Run,
    *,
    parts: int = 1,
    epochs: int = 1,
    bf16: bool = False,
    divide_by: str = "parts",
    before: Callable[[int], object] = lambda step: None,
) -> Run:
    """The loop that says what is right.

    The loss of a step is the sum of those of its batches, each by ``parts``, or by how many batches
    the step really has; or the net divides it by items.
    """
    if run.averaged is None:
        run.average()
    batches, step = [*loader()], 0
    for _ in range(epochs):
        for first in range(0, len(batches), parts):
            before(step)
            micro = batches[first : first + parts]
            divisor = {"parts": parts, "batches": len(micro), "items": 1}[divide_by]
            run.optimizer.zero_grad()
            total = torch.zeros(())
            for x, y in micro:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = run.net(x, y)["loss"] / divisor
                loss.backward()
                total += loss.detach()
            run.optimizer.step(loss=total)
            run.averaged.update_parameters(run.net)
            step += 1
    return run


def step(how: str, backward: Any, net: Any, optimizer: Any, batch: Any) -> None:
    """By what a framework has set up: with a closure, or without, of a loss that is watched."""

    def closure() -> Tensor:
        loss: Tensor = net(*batch)["loss"]
        backward(loss)
        return loss

    if how == "closure":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


# Lightning ----------------------------------------------------------------------------------------


class Lit(lightning.LightningModule):
    """An ordinary module, but that its optimizer exists already."""

    def __init__(self, run: Run, how: str = "closure") -> None:
        super().__init__()
        self.net, self.run, self.how = run.net, run, how
        self.automatic_optimization = "manual" not in how
        if "watched" in how:
            run.optimizer.watch_loss(self.net.criterion)

    def configure_optimizers(self) -> Any:
        return self.run.optimizer

    def training_step(self, batch: list[Tensor], _: int) -> Any:
        loss = self.net(*batch)["loss"]
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.how == "manual closure":
            optimizer.step(lambda: loss)
        elif self.how == "manual loss":
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        return None


class Averaging(callbacks.Callback):
    """Averages after every step; is saved and resumed with the rest."""

    def __init__(self) -> None:
        self.averaged: AveragedModel | None = None
        self.saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        averaged = self.averaged = AveragedModel(module.net, trainer.optimizers[0])
        if self.saved is not None:
            averaged.load_state_dict(self.saved)
        trainer.optimizers[0].register_step_post_hook(
            lambda *_: averaged.update_parameters(module.net)
        )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averaged is None else dict(self.averaged.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict


def lightning_fit(run: Run, how: str = "closure", callbacks: Any = (), **settings: Any) -> Run:
    fit = {key: settings.pop(key) for key in ("ckpt_path", "weights_only") if key in settings}
    averaging = Averaging()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    chosen = {"max_epochs": 1, "enable_checkpointing": False, **quiet, **settings}
    trainer = lightning.Trainer(accelerator="cpu", callbacks=[averaging, *callbacks], **chosen)
    trainer.fit(Lit(run, how), loader(), **fit)
    run.averaged = averaging.averaged
    return run


# Hugging Face -------------------------------------------------------------------------------------


class AveragingCallback(transformers.TrainerCallback):
    """Averages after every step; is saved and resumed with the rest."""

    def __init__(self, averaged: AveragedModel) -> None:
        self.averaged = averaged

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.averaged.update_parameters(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.averaged.state_dict(), folder / "averaged.pt")


def trainer_fit(run: Run, folder: Path, resume: Path | None = None, **settings: Any) -> Run:
    """No gradient clipping, which is on by default; data in order."""
    run.average()
    run.optimizer.watch_loss(settings.pop("watched", run.net))
    function = settings.pop("compute_loss_func", None)
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    chosen = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "save_strategy": "no",
    }
    if resume is not None:
        run.averaged.load_state_dict(torch.load(resume / "averaged.pt", weights_only=True))
    trainer = transformers.Trainer(
        run.net,
        transformers.TrainingArguments(str(folder), **(quiet | chosen | settings)),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(*data().tensors, strict=True)],
        optimizers=(run.optimizer, None),
        callbacks=[AveragingCallback(run.averaged)],
        compute_loss_func=function,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run

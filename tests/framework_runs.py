"""Trainings by frameworks, and the plain loop that they must equal; for test_frameworks.py.

As a program it is one rank of a training in several processes. Usage:

    torchrun ... framework_runs.py FRAMEWORK FOLDER

leaves RANK.pt in FOLDER: for each kind of optimizer the γ of all steps, and where it ended.
"""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import lightning
import numpy as np
import torch
import transformers
from helpers import everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW, param_groups

KINDS: dict[str, Any] = {"float": DFW, "binary": ProjectedDFW, "ternary": TernaryDFW}

Batch = tuple[Tensor, Tensor]


# What is trained -----------------------------------------------------------------------------


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """1,797 images of 1×8×8 in [-1, 1] and their labels, in an order of their own."""
    bunch = load_digits()
    images = torch.tensor(np.asarray(bunch.images), dtype=dtype)[:, None] / 8 - 1
    labels = torch.tensor(np.asarray(bunch.target))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def loader(start: int, stop: int, batch_size: int, dtype: torch.dtype) -> DataLoader[Any]:
    """Batches of digits, in order."""
    images, labels = digits(dtype)
    return DataLoader(TensorDataset(images[start:stop], labels[start:stop]), batch_size)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """No normalisation over the batch: a large batch has the gradient of its parts."""
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(64, 10)).to(dtype)


def transformer(dtype: torch.dtype = torch.float32) -> Any:
    """A vision transformer of Hugging Face, whose output has a ``loss``."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=10,
        initializer_range=0.2,  # the default, 0.02, is meant for a width of 768
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config).to(dtype)


def convolutional() -> Any:
    """A residual network of Hugging Face, with BatchNorm."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return transformers.ResNetForImageClassification(config)


def make(kind: str, model: nn.Module, **settings: Any) -> Any:
    params = model.parameters() if kind == "float" else param_groups(model)
    return KINDS[kind](params, **settings)


@dataclass
class Record:
    """What a training did."""

    optimizer: Any
    gammas: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer.register_step_post_hook(
            lambda optimizer, _, __: self.gammas.append(float(optimizer.gamma))
        )

    def numbers(self) -> list[Tensor]:
        """All parameters and all state."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = [value for p in params for _, value in sorted(self.optimizer.state[p].items())]
        return [tensor.detach().clone() for tensor in [*params, *state]]


@dataclass
class Result:
    """What another process recorded."""

    gammas: list[float]
    tensors: list[Tensor]

    def numbers(self) -> list[Tensor]:
        return self.tensors


# The loop that says what is right ------------------------------------------------------------


def plain_loop(
    optimizer: Any,
    objective: Callable[[Sequence[Any]], Iterable[Tensor]],
    batches: Iterable[Any],
    *,
    parts: int = 1,
    epochs: int = 1,
    scheduler: Any = None,
) -> Record:
    """Steps on ``parts`` batches each.

    ``objective`` gives the terms of a step's loss, one a batch; each term is differentiated before
    the next is computed, and the step is passed their sum.
    """
    record = Record(optimizer)
    batches = list(batches)
    for _ in range(epochs):
        for start in range(0, len(batches), parts):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for term in objective(batches[start : start + parts]):
                term.backward()
                total += term.detach()
            optimizer.step(loss=total)
            if scheduler is not None:
                scheduler.step()
    return record


def divided(
    net: nn.Module, criterion: nn.Module, parts: int
) -> Callable[[Sequence[Batch]], Iterable[Tensor]]:
    """The mean loss of ``parts`` batches, also where there are fewer."""
    return lambda batches: (criterion(net(x), y) / parts for x, y in batches)


# Lightning -----------------------------------------------------------------------------------


class Lit(lightning.LightningModule):
    """An ordinary module; only ``watched`` and the record are for the test."""

    record: Record

    def __init__(
        self,
        kind: str,
        *,
        watched: bool = False,
        dtype: torch.dtype = torch.float32,
        steps: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.kind, self.watched, self.steps, self.settings = kind, watched, steps, settings
        self.net = mlp(dtype)
        self.criterion = MultiClassHingeLoss(smooth=True)

    def configure_optimizers(self) -> Any:
        optimizer = make(self.kind, self.net, **self.settings)
        self.record = Record(optimizer)
        if self.watched:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            optimizer.watch_loss(self.criterion, scaler=scaler)
        if self.steps is None:
            return optimizer
        scheduler = CosineAnnealingLR(optimizer, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def training_step(self, batch: Batch, _: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.criterion(self.net(images), labels)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        images, labels = batch
        scores = self.net(images)
        self.log("loss", self.criterion(scores, labels))
        self.log("accuracy", (scores.argmax(1) == labels).float().mean())


class ManualLit(Lit):
    """Runs backward and the step itself; Lightning gives every step a closure."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, number: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        loss = super().training_step(batch, number)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step(lambda: loss)


def lightning_trainer(**settings: Any) -> Any:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**(quiet | settings))


# Hugging Face --------------------------------------------------------------------------------


def examples(start: int, stop: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    images, labels = digits(dtype)
    pairs = zip(images[start:stop], labels[start:stop], strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def trainer_arguments(folder: Path, **settings: Any) -> Any:
    """No gradient clipping, as docs/frameworks.md says; data in order."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "per_device_eval_batch_size": 400,
        "max_grad_norm": 0,
    }
    return transformers.TrainingArguments(**(chosen | settings))


def mean_over_items(model: Any) -> Callable[[Sequence[Any]], Iterable[Tensor]]:
    """The mean over all samples of a step: Trainer's loss for models that are told their number."""

    def objective(batches: Sequence[Batch]) -> Iterable[Tensor]:
        items = sum(len(labels) for _, labels in batches)
        for images, labels in batches:
            logits = model(pixel_values=images).logits
            yield nn.functional.cross_entropy(logits, labels, reduction="sum") / items

    return objective


# One rank of several -------------------------------------------------------------------------

RANKS, STEPS, PART, PARTS = 2, 12, 8, 2
"""Each step is on ``PARTS`` batches of ``PART`` images on each rank."""
TRAINED = STEPS * PARTS * PART * RANKS
DISTRIBUTED: dict[str, Any] = {"lightning": 0.5, "transformers": 0.5, "accelerate": 2.0}
"""Learning rates with which γ is now and then below 1."""


def rank_lightning(kind: str, _: Path) -> Record:
    module = Lit(kind, watched=True, dtype=torch.float64, lr=DISTRIBUTED["lightning"])
    trainer = lightning_trainer(
        strategy="ddp",
        devices=RANKS,
        max_epochs=1,
        precision="64-true",
        accumulate_grad_batches=PARTS,
    )
    images, labels = digits(torch.float64)
    data = TensorDataset(images[:TRAINED], labels[:TRAINED])
    # Lightning's own would be shuffled.
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, RANKS, int(os.environ["RANK"]), shuffle=False
    )
    trainer.fit(
        module,
        DataLoader(data, PART, sampler=sampler),
        loader(1400, 1500, 25, torch.float64),
    )
    return module.record


def rank_transformers(kind: str, folder: Path) -> Record:
    model = transformer(torch.float64)
    optimizer = make(kind, model, lr=DISTRIBUTED["transformers"])
    record = Record(optimizer)
    optimizer.watch_loss(model)
    arguments = trainer_arguments(
        folder,
        ddp_backend="gloo",
        num_train_epochs=1,
        per_device_train_batch_size=PART,
        gradient_accumulation_steps=PARTS,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=5,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=examples(0, TRAINED, torch.float64),
        eval_dataset=examples(1400, 1500, torch.float64),
        optimizers=(optimizer, None),
    )
    trainer.train()
    return record


def rank_accelerate(kind: str, _: Path) -> Record:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    net = mlp(torch.float64)
    record = Record(make(kind, net, lr=DISTRIBUTED["accelerate"]))
    criterion = MultiClassHingeLoss(smooth=True)
    record.optimizer.watch_loss(criterion)
    model, optimizer, batches = accelerator.prepare(
        net, record.optimizer, loader(0, TRAINED, PART, torch.float64)
    )
    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
    return record


def main() -> None:
    framework, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    train = {
        "lightning": rank_lightning,
        "transformers": rank_transformers,
        "accelerate": rank_accelerate,
    }[framework]
    results = {}
    for kind in KINDS:
        record = train(kind, folder)
        results[kind] = {
            "gammas": record.gammas,
            "bits": repr(everything(record.optimizer)),
            "numbers": record.numbers(),
        }
    assert torch.distributed.get_world_size() == RANKS
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

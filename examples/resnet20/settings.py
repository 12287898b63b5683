"""What a run is: every choice that decides its weights, with defaults that depend on each other."""

from dataclasses import dataclass
from typing import Any

import torch
from common import UserError

PLACE = ("device", "threads")  # may differ when a run is resumed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run, all of them plain values; ``None`` is the optimizer's own choice."""

    arch: str = "resnet20"
    net: str
    bits: int | None
    shortcut: str = "resnet"
    optimizer: str
    norm: str | None = None
    loss: str = "ce"
    smooth: bool
    lr: Any
    momentum: Any
    weight_decay: Any
    radius: float | None = None
    threshold: float | None = None
    relax: float | None = None
    epochs: int = 20
    batch_size: int
    schedule: str
    average: bool
    seed: int = 0
    amp: str
    limit: int | None = None
    validate: bool = False
    data: str | None = None
    device: str
    threads: int | None = None

    @classmethod
    def choose(cls, given: dict[str, Any]) -> "Settings":
        """Complete what the user gave by defaults."""
        optimizer = given.get("optimizer", "dfw")
        dfw, parq = optimizer == "dfw", optimizer == "parq"
        # Only ResNet-20 has a form with sign activations.
        signs = given.get("arch", "resnet20") == "resnet20" and not parq
        net = given.get("net", "xnor" if signs else "binary")
        schedule = given.get("schedule", "none" if dfw else "parq" if parq else "cosine")
        device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
        lr = {"dfw": None, "adam": 0.001 if net == "float" else 0.005, "muon": 0.005}
        decay = {"dfw": None, "sgd": 1e-4 if net == "float" else 0.0, "parq": 2e-4}
        defaults = {
            "net": net,
            "bits": 4 if net == "uniform" else None,
            "optimizer": optimizer,
            "smooth": given.get("loss") == "svm",
            "lr": lr.get(optimizer, 0.1),
            "momentum": {"dfw": None, "muon": 0.95}.get(optimizer, 0.9),
            "weight_decay": decay.get(optimizer, 0.0),
            "batch_size": 32 if given.get("data") is None else 128,
            "schedule": schedule,
            "average": dfw and schedule == "none",
            "amp": "bf16" if device.startswith("cuda") else "off",
            "device": device,
        }
        settings = cls(**(defaults | given))
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse what does not go together."""
        dfw, parq = self.optimizer == "dfw", self.optimizer == "parq"
        latents, ternary = dfw and self.net != "float", dfw and self.net == "ternary"
        resnet, weights = self.arch == "resnet20", self.net in ("binary", "ternary")
        rules = (
            ("--smooth", "--loss svm", self.smooth, self.loss == "svm"),
            ("--bits", "--net uniform", self.bits, self.net == "uniform"),
            ("--net uniform", "--optimizer dfw", self.net == "uniform", dfw),
            ("--net xnor", "--arch resnet20", self.net == "xnor", resnet),
            ("--shortcut bireal", "--arch resnet20", self.shortcut == "bireal", resnet),
            ("--optimizer parq", "--net binary or ternary", parq, weights),
            ("--average", "--optimizer dfw, adam, sgd or muon", self.average, not parq),
            ("--norm", "--optimizer dfw", self.norm, dfw),
            ("--radius", "--optimizer dfw and quantized weights", self.radius, latents),
            ("--threshold", "--optimizer dfw --net ternary", self.threshold, ternary),
            ("--relax", "--optimizer dfw and quantized weights", self.relax, latents),
        )
        for name, needed, given, fits in rules:
            if given and not fits:
                raise UserError(f"{name} needs {needed}; add that or leave {name} out")

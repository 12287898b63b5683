"""What a run is: every choice that decides its weights, with defaults that depend on each other."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .command_line import default_net
from .errors import UserError

# What may differ when a run is resumed: where it happens, not what happens.
_PLACE = frozenset({"data", "device", "threads"})
# What runs were before they could choose it.
_BEFORE = {
    "arch": "resnet20",
    "average": None,
    "bits": None,
    "float_epochs": 0,
    "radius": None,
    "relax": 0.0,
    "step_size": None,
}


@dataclass(frozen=True)
class Settings:
    """The settings of one run, all of them plain values."""

    arch: str
    net: str
    bits: int | None
    shortcut: str
    optimizer: str
    loss: str
    smooth: bool
    lr: float
    momentum: float
    weight_decay: float
    radius: float | None
    step_size: str | None
    epochs: int
    float_epochs: int
    relax: float
    batch_size: int
    schedule: str
    average: float | None
    seed: int
    amp: str
    compile: bool
    limit: int | None
    validate: bool
    data: str | None
    device: str
    threads: int | None

    @classmethod
    def choose(cls, given: dict[str, Any]) -> "Settings":
        """Complete what the user gave by defaults."""
        net = given.get("net", default_net(given))
        optimizer = given.get("optimizer", "dfw")
        dfw = optimizer == "dfw"
        # The hinge loss is what DFW is made for. The baselines have cross-entropy, with which
        # they do better.
        loss = given.get("loss", "svm" if dfw else "ce")
        digits = given.get("data") is None
        device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = {
            "arch": "resnet20",
            "net": net,
            "bits": 4 if net == "uniform" else None,
            "shortcut": "resnet",
            "optimizer": optimizer,
            "loss": loss,
            "smooth": dfw and loss == "svm",
            "lr": _learning_rate(net, optimizer),
            "momentum": 0.9,
            "weight_decay": _weight_decay(net, optimizer),
            "radius": None,
            "step_size": None,
            "epochs": 20,
            "float_epochs": 0,
            "relax": 0.0,
            "batch_size": 32 if digits else 128,
            "schedule": "parq" if optimizer == "parq" else "cosine",
            "average": None,
            "seed": 0,
            "amp": None,
            "compile": False,
            "limit": None,
            "validate": False,
            "data": None,
            "threads": None,
        } | given
        _check(chosen)
        chosen["device"] = _check_device(device)
        chosen["amp"] = chosen["amp"] or _faster_precision(torch.device(device))
        return cls(**chosen)

    @classmethod
    def of_checkpoint(cls, stored: dict[str, Any]) -> "Settings":
        """The settings that `to_dict` gave."""
        try:
            return cls(**(_BEFORE | stored))
        except TypeError as error:
            raise UserError(
                "the checkpoint is from another version of this example; choose another --out"
            ) from error

    def moved(self, given: dict[str, Any]) -> "Settings":
        """The settings of a run that is resumed with ``given`` on its command line."""
        differing = [
            name
            for name, value in given.items()
            if name not in _PLACE and value != getattr(self, name)
        ]
        if differing:
            name = differing[0]
            raise UserError(
                f"the run to resume has {option(name)} {getattr(self, name)}, "
                f"not {given[name]}; leave the option out or choose another --out"
            )
        place = {name: value for name, value in given.items() if name in _PLACE}
        moved = dataclasses.replace(self, **place)
        _check_device(moved.device)
        return moved

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return dataclasses.asdict(self)

    def at(self, epoch: int) -> "Settings":
        """What decides how the epoch with this number (from 0) trains: at first maybe float."""
        return dataclasses.replace(self, net="float") if epoch < self.float_epochs else self

    @property
    def loss_name(self) -> str:
        """The loss, in words."""
        if self.loss == "ce":
            return "cross-entropy"
        return "smoothed SVM" if self.smooth else "SVM"

    @property
    def precision(self) -> str:
        """What the network computes in."""
        return "bfloat16" if self.amp == "bf16" else "float32"


def _learning_rate(net: str, optimizer: str) -> float:
    # Chosen by trying a few, a factor of about three apart, on the digits; for DFW on CIFAR-10 too.
    if optimizer == "adam":
        return 1e-3 if net == "float" else 5e-3
    return 0.3 if (net, optimizer) == ("xnor", "dfw") else 0.1


def _weight_decay(net: str, optimizer: str) -> float:
    if optimizer == "parq":
        return 2e-4
    return 1e-4 if net == "float" and optimizer != "adam" else 0.0


def option(name: str) -> str:
    """How the setting ``name`` is spelt on the command line."""
    return "--" + name.replace("_", "-")


def _check(chosen: dict[str, Any]) -> None:
    """Refuse what does not go together."""
    if chosen["smooth"] and chosen["loss"] != "svm":
        raise UserError("--smooth is for the svm loss; add --loss svm")
    if chosen["bits"] is not None and chosen["net"] != "uniform":
        raise UserError("--bits is for --net uniform")
    if chosen["net"] == "uniform" and chosen["optimizer"] != "dfw":
        raise UserError("--net uniform is for --optimizer dfw; leave --optimizer out")
    for name in ("radius", "step_size"):
        if chosen[name] is not None and (chosen["optimizer"] != "dfw" or chosen["net"] == "float"):
            raise UserError(f"{option(name)} is for --optimizer dfw with quantized weights")
    if chosen["arch"] != "resnet20" and chosen["net"] == "xnor":
        raise UserError("--net xnor is for --arch resnet20; choose another net")
    if chosen["arch"] != "resnet20" and chosen["shortcut"] != "resnet":
        raise UserError(f"--shortcut {chosen['shortcut']} is for --arch resnet20; leave it out")
    if chosen["optimizer"] == "parq" and chosen["net"] not in ("binary", "ternary"):
        raise UserError("--optimizer parq is for --net binary and ternary")
    if chosen["float_epochs"] and chosen["net"] == "float":
        raise UserError("--float-epochs is for nets whose weights are quantized later")
    if chosen["float_epochs"] and chosen["optimizer"] == "parq":
        raise UserError("--float-epochs is for dfw, adam and sgd; parq starts from float by itself")
    if chosen["float_epochs"] >= chosen["epochs"]:
        raise UserError(
            f"--float-epochs {chosen['float_epochs']} must be less than the {chosen['epochs']} "
            "of --epochs, or nothing is quantized"
        )
    if chosen["relax"] and (chosen["optimizer"] != "dfw" or chosen["net"] == "float"):
        raise UserError("--relax is for --optimizer dfw with quantized weights")
    if chosen["relax"] and chosen["float_epochs"]:
        raise UserError("--relax and --float-epochs both start from float weights; choose one")
    if chosen["optimizer"] == "parq" and chosen["average"] is not None:
        raise UserError("--average is for the optimizers dfw, adam and sgd")


def _check_device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); "
            "--device cpu always can"
        ) from error
    return name


def _faster_precision(device: torch.device) -> str:
    """bfloat16 where the hardware computes with it, as it is then about 1.5 times as fast.

    Elsewhere it would be emulated, and slower than float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    if device.type == "cpu":
        # torch has no public question for this yet.
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            if getattr(torch.cpu, name, lambda: False)():
                return "bf16"
    return "off"

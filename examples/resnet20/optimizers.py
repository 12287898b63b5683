"""The optimizer, the form of the network that goes with it, the loss and the schedules."""

from collections.abc import Callable
from typing import Any

import torch
from common import FrankWolfe, UserError
from torch import Tensor, nn

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW, param_groups

from . import straight_through
from .nets import Network
from .settings import Settings


def frank_wolfe(model: nn.Module, settings: Settings) -> FrankWolfe:
    """DFW takes the model as it is, and chooses what was not given."""
    names = ("lr", "momentum", "weight_decay", "norm")
    given = {name: x for name in names if (x := getattr(settings, name)) is not None}
    groups = param_groups(model)
    if settings.net == "float":
        return DFW(groups, **given)
    keys = ("bits", "radius", "threshold")
    own: dict[str, Any] = {key: x for key in keys if (x := getattr(settings, key)) is not None}
    own |= {"quantizer": "uniform"} if settings.net == "uniform" else {}
    for group in groups:
        group |= own if group["name"].startswith("quantized") else {}
    optimizer = (TernaryDFW if settings.net == "ternary" else ProjectedDFW)(groups, **given)
    if settings.relax:
        optimizer.relax(1.0)  # float at first; the loop lowers it
    return optimizer


def attach(model: Network, settings: Settings, steps: int) -> list[Any]:
    """Make the optimizer for ``model`` and a run of so many ``steps``; with Muon there are two."""
    if settings.optimizer == "dfw":
        return [frank_wolfe(model, settings)]
    if settings.optimizer == "parq":
        return [parq(model, settings, steps)]
    # For Adam, SGD and Muon the layers that are to be quantized are replaced first.
    if settings.net != "float" or settings.optimizer == "muon":
        straight_through.convert(model.blocks, settings.net)
    # A latent counts by its sign or zone alone: decay would drag it to where it flips.
    decay = settings.weight_decay
    quantized = {"weight_decay": decay if settings.net == "float" else 0.0}
    latents: dict[str, Any] = {"params": []} | quantized
    scales: dict[str, Any] = {"params": []} | quantized
    rest: dict[str, Any] = {"params": [], "weight_decay": decay}
    for name, p in model.named_parameters():
        group = latents if name.endswith("latent") else scales if ".scale_" in name else rest
        group["params"].append(p)
    if settings.optimizer == "sgd":
        return [torch.optim.SGD([latents, scales, rest], settings.lr, settings.momentum)]
    if settings.optimizer == "adam":
        return [torch.optim.Adam([latents, scales, rest], settings.lr, (settings.momentum, 0.999))]
    # Muon takes matrices only. Its steps are made as long as AdamW's, so that both have one lr.
    given = {"momentum": settings.momentum, "adjust_lr_fn": "match_rms_adamw"}
    others = torch.optim.AdamW([scales, rest], settings.lr)
    return [torch.optim.Muon([latents], settings.lr, **given), others]


def parq(model: Network, settings: Settings, steps: int) -> torch.optim.Optimizer:
    """PARQ (Jin et al., ICML 2025), by torchao, with its authors' recipe for ResNet-20.

    What the recipe counts in epochs or steps, 200 epochs of 391, are shares of the run here: the
    drops of lr, the warm-up of 200 steps, and the annealing, which ends at three quarters. From
    there on the weights in the network are the quantized ones. Levels are those of a channel.
    """
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer, UnifQuantizer

    if steps < 2:
        raise UserError(f"--epochs {settings.epochs} is too short for --optimizer parq; raise it")
    binary, decay = settings.net == "binary", settings.weight_decay
    quantized: dict[str, Any] = {"params": [], "quant_bits": 1 if binary else 0}  # 0: ternary
    biases: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    rest: dict[str, Any] = {"params": []}
    for name, p in model.named_parameters():
        inside = name.startswith("blocks.") and p.dim() == 4
        group = quantized if inside else biases if name.endswith("bias") else rest
        # It is written to through a flat view, which would be a copy if channels were last.
        p.data = p.data.contiguous()
        group["params"].append(p)
    groups = [quantized, biases, rest]
    optimizer: torch.optim.Optimizer = QuantOptimizer(
        torch.optim.SGD(groups, settings.lr, momentum=settings.momentum, weight_decay=decay),
        # Of one bit both have the same levels, which LSBQuantizer gets with rounding errors.
        UnifQuantizer() if binary else LSBQuantizer(),
        ProxPARQ(anneal_start=0, anneal_end=int(0.75 * steps), steepness=100),
        warmup_steps=max(1, steps // 391),
        quant_period=10,
        quant_per_channel=True,
    )
    return optimizer


def criterion(settings: Settings) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a batch."""
    if settings.loss == "ce":
        return nn.CrossEntropyLoss()
    return MultiClassHingeLoss(smooth=settings.smooth)

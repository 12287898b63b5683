"""The optimizer and the form of the network that go together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW, param_groups

from . import parq, straight_through
from .network import Network
from .settings import Settings

OPTIMIZERS = ("dfw", "adam", "sgd", "parq")
LOSSES = ("svm", "ce")

FrankWolfe = DFW | ProjectedDFW | TernaryDFW


def attach(model: Network, settings: Settings, steps: int) -> torch.optim.Optimizer:
    """Make the optimizer for ``model`` and a run of so many ``steps``.

    A DFW optimizer and PARQ take the model as it is. For Adam and SGD the layers that are to be
    quantized are replaced first.
    """
    if settings.optimizer == "dfw":
        return _dfw(model, settings)
    if settings.optimizer == "parq":
        return parq.attach(model, settings, steps)
    if settings.net in ("binary", "xnor"):
        straight_through.convert(model.blocks, straight_through.BinaryConv2d)
    elif settings.net == "ternary":
        straight_through.convert(model.blocks, straight_through.TernaryConv2d)
    # Weight decay is for float weights. A latent counts by its sign or zone alone, so decay would
    # only drag it to where it flips at random; and a scale, as in the DFW optimizers, has none.
    quantized = {
        id(parameter)
        for layer in straight_through.layers(model)
        for parameter in layer.parameters(recurse=False)
    }
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in quantized]},
        {"params": [p for p in model.parameters() if id(p) in quantized], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr, betas=(settings.momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(groups, lr, momentum=settings.momentum, weight_decay=decay)


def criterion(settings: Settings) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a batch."""
    if settings.loss == "svm":
        return MultiClassHingeLoss(smooth=settings.smooth)
    return nn.CrossEntropyLoss()


def _dfw(model: Network, settings: Settings) -> FrankWolfe:
    if settings.net == "float":
        return DFW(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    quantized, rest = param_groups(model)
    rest["weight_decay"] = settings.weight_decay  # see above: none for latents
    if settings.net == "uniform":
        quantized |= {"quantizer": "uniform", "bits": settings.bits}
    for name in ("radius", "step_size"):  # else the optimizer's own
        if (value := getattr(settings, name)) is not None:
            quantized[name] = value
    if settings.relax:
        quantized["relaxation"] = 1.0  # the loop lowers it
    optimizer = TernaryDFW if settings.net == "ternary" else ProjectedDFW
    return optimizer([quantized, rest], lr=settings.lr, momentum=settings.momentum)

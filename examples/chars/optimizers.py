"""The optimizer and the form of the network that go together."""

from typing import Any

import torch

from dfw_opt import DFW, TernaryDFW, param_groups

from . import straight_through
from .net import CharTransformer
from .settings import Settings

OPTIMIZERS = ("dfw", "adamw", "sgd")
FrankWolfe = DFW | TernaryDFW

_SECOND_BETA = 0.95  # as for most language models; torch's 0.999 is slow to forget


def attach(model: CharTransformer, settings: Settings) -> torch.optim.Optimizer:
    """Make the optimizer for ``model``.

    `TernaryDFW` takes the model as it is. For AdamW and SGD the layers that are to be ternary are
    replaced first.
    """
    if settings.optimizer == "dfw" and settings.net == "ternary":
        # Left alone, param_groups keeps the first Linear layer in float, which should be the one
        # that sees the input. Here that is the embedding, and the first Linear layer is a query.
        groups = _with_rates(model, param_groups(model, skip="head"), settings)
        return TernaryDFW(groups, momentum=settings.momentum)
    if settings.net == "ternary":
        straight_through.convert(model.blocks)
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = _with_rates(model, [{"params": matrices}, {"params": others}], settings)
    if settings.optimizer == "dfw":
        return DFW(groups, momentum=settings.momentum)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(settings.momentum, _SECOND_BETA))
    return torch.optim.SGD(groups, momentum=settings.momentum)


def _with_rates(
    model: CharTransformer, groups: list[dict[str, Any]], settings: Settings
) -> list[dict[str, Any]]:
    """Give each group its learning rate, and queries and keys a group of their own."""
    matrices, others = groups
    aim = [p for name, p in model.named_parameters() if ".query." in name or ".key." in name]
    rest = [p for p in matrices["params"] if not any(p is matrix for matrix in aim)]
    # Weight decay is for the matrices of the blocks, ternary or not.
    decay = {"weight_decay": settings.weight_decay}
    return [
        matrices | decay | {"params": rest, "lr": settings.lr},
        matrices | decay | {"params": aim, "lr": settings.attention_lr, "name": "attention"},
        others | {"lr": settings.float_lr, "weight_decay": 0.0},
    ]

"""The moving average of the network in training: of its latents, quantized again, not of weights.

A DFW optimizer holds the latents, so it takes `dfw_opt.AveragedModel`. Those of Adam and SGD are
parameters of the straight-through layers, which quantize their averages by themselves.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from dfw_opt import AveragedModel

from .optimizers import FrankWolfe


class Average:
    """Follows ``model``, and forgets what it was by the factor ``decay`` at every step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> None:
        moving = swa_utils.get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._source = model
        self._averaged: swa_utils.AveragedModel = (
            AveragedModel(model, optimizer, multi_avg_fn=moving)
            if isinstance(optimizer, FrankWolfe)
            else swa_utils.AveragedModel(model, multi_avg_fn=moving)
        )

    @property
    def model(self) -> nn.Module:
        """The averaged network. Its norms are those of the network in training until estimated."""
        return self._averaged.module

    def update(self) -> None:
        """Take in where a step has led."""
        self._averaged.update_parameters(self._source)

    def estimate_norms(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take the statistics of BatchNorm from ``batches``: its own, not of other weights."""
        swa_utils.update_bn(batches, self.model)

    def state_dict(self) -> dict[str, Any]:
        """The averages, for a checkpoint."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        self._averaged.load_state_dict(state)

"""How the latent weights of a run behave, whichever optimizer moves them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dfw_opt.quantizers import QUANTIZERS

from . import straight_through


class WeightWatch:
    """Reads the latents and quantized weights of a network; has nothing to say on a float one."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._layers = straight_through.layers(model)
        self._optimizer = optimizer
        self._before = self._zones()

    @torch.no_grad()
    def at_bound(self) -> float:
        """The share of latents at a bound of their box; NaN if there are none."""
        latents = self._latents()
        count = sum(latent.numel() for latent, _ in latents)
        if count == 0:
            return math.nan
        return sum(int((latent.abs() >= bound).sum()) for latent, bound in latents) / count

    @torch.no_grad()
    def flip_rate(self) -> float:
        """The share of quantized weights whose sign or zone is not what it was at the last call."""
        zones = self._zones()
        count = sum(zone.numel() for zone in zones)
        if count == 0:
            return math.nan
        pairs = zip(zones, self._before, strict=True)
        changed = sum(int((now != before).sum()) for now, before in pairs)
        self._before = zones
        return changed / count

    def _latents(self) -> list[tuple[Tensor, float]]:
        if self._layers:
            return [(layer.weight, straight_through.BOUND) for layer in self._layers]
        return [
            (self._optimizer.state[p]["latent"], group["radius"])
            for group, p in self._held_by_optimizer()
        ]

    @torch.no_grad()
    def _zones(self) -> list[Tensor]:
        if self._layers:
            return [layer.quantized().sign().to(torch.int8) for layer in self._layers]
        # Not of the parameters, which may be relaxed.
        quantized = [
            QUANTIZERS[group["quantizer"]].quantize(self._optimizer.state[p], group)
            for group, p in self._held_by_optimizer()
        ]
        return [weight.sign().to(torch.int8) for weight in quantized]

    def _held_by_optimizer(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [
            (group, p)
            for group in self._optimizer.param_groups
            if group.get("quantizer") is not None
            for p in group["params"]
        ]

"""Averages over an epoch, kept on the device so that no step waits for the one before it."""

import math

import torch
from torch import Tensor

from .distributed import Team


class Meter:
    """Sums up losses, correct answers and step sizes.

    Steps with a loss that is not finite are left out of the mean loss and γ (a DFW optimizer skips
    them, and says how many there were); if all are, the mean is NaN.
    """

    def __init__(self, device: torch.device) -> None:
        # Of the loss, the correct answers and γ, each weighted by the images of its batch.
        self._sums = torch.zeros(3, device=device)
        self._images = torch.zeros(3, device=device)

    def add(self, loss: Tensor, correct: Tensor, images: int, gamma: Tensor | None = None) -> None:
        """Add one batch."""
        if gamma is None:
            gamma = torch.full_like(loss, math.nan)
        values = torch.stack((loss * images, correct.to(loss), gamma.to(loss) * images))
        finite = values.isfinite()
        self._sums += torch.where(finite, values, 0.0)
        self._images += finite * images

    def join(self, team: Team) -> None:
        """Add what the meters of the other processes have seen."""
        self._sums, self._images = team.total(self._sums), team.total(self._images)

    def read(self) -> tuple[float, float, float]:
        """Mean loss, accuracy and mean γ; this waits for the device."""
        loss, accuracy, gamma = (self._sums / self._images).tolist()
        return loss, accuracy, gamma

"""What every quantizer provides, and the normalised latent and the channels that they share.

All functions here and in the quantizers work on batches: tensors of one shape along a first
dimension, and for each of them numbers of shape ``(batch, 1, ...)``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_MIN = 1e-3
"""The least value of what is trained beside the latent: two levels must never share a sign."""

State = dict[str, Tensor]
"""What is kept for a parameter, or for a batch of them: ``"latent"``, ``"unit"``, scales."""


class Pullback(NamedTuple):
    r"""The gradient :math:`\delta` of one trained variable, and its metric :math:`M`, a number for
    all of a tensor: the squared change of the weights per unit step of one variable; ``None`` is 1.
    """

    gradient: Tensor
    metric: Tensor | None


@dataclass
class Quantizer:
    r"""Latent to weight, and gradient at the weight to gradients of what is trained.

    Attributes:
        axis: the dimensions that number a weight's output channels, each of which has a scale.
        groups: of a transposed convolution, whose first dimension they divide.
        norm: in which a step is measured.
        scales: the state keys of what is trained beside the latent, in the unit :math:`c`.
        leveled: whether levels follow from the latents, so that the box bounds them.
    """

    axis: Sequence[int] = (0,)
    groups: int = 1
    norm: str = "spectral"
    scales = tuple[str, ...]()
    leveled = True

    def start(self, weight: Tensor, radius: float) -> State:
        r"""The state of parameters that hold ``weight``: :math:`w = c\,u`, :math:`u \in [-R, R]`.

        The unit is :math:`c = \max|w|`, and at least :math:`1/\sqrt n` where the box bounds the
        levels, for channels of :math:`n` weights: a layer of tiny weights must outgrow them.
        """
        unit, usual = by_tensor(weight.abs(), torch.amax), self.channel_size(weight) ** -0.5
        # Its square, which is in the metric, must be within what float32 can hold.
        unit = unit.clamp(min=usual) if self.leveled else torch.where(unit < 1e-15, usual, unit)
        latent = (weight / unit).clamp(-radius, radius)
        return {"latent": latent, "unit": unit, **self.starting_scales(latent)}

    def starting_scales(self, latent: Tensor) -> State:
        """The first values of :attr:`scales`."""
        return {}

    def quantize(self, state: State) -> Tensor:
        """:math:`Q(u)`: the weights that the network sees."""
        raise NotImplementedError

    def pull_back(self, grad: Tensor, state: State) -> dict[str, Pullback]:
        r"""From :math:`g`, the gradient at :math:`Q(u)`, those of the latent and of each scale."""
        raise NotImplementedError

    def channel_size(self, x: Tensor) -> int:
        """:math:`n`, the number of weights of an output channel."""
        return x[0].numel() // (self.groups * math.prod([x.shape[d + 1] for d in self.axis]))

    def by_channel(self, x: Tensor, how: Callable[..., Tensor]) -> Tensor:
        """``torch.mean`` or ``torch.amax`` over each output channel, to broadcast over ``x``."""
        kept = {d + 1 for d in self.axis}
        if self.groups == 1:
            return how(x, [d for d in range(1, x.dim()) if d not in kept], keepdim=True)
        # (group × input, output / groups, ...): a channel is a group and an output within it.
        grouped = x.unflatten(1, (self.groups, -1))  # type: ignore[no-untyped-call]
        result = how(grouped, [d for d in range(2, x.dim() + 1) if d - 1 not in kept], keepdim=True)
        return result.expand(-1, -1, grouped.shape[2], *result.shape[3:]).flatten(1, 2)


def by_tensor(x: Tensor, how: Callable[..., Tensor]) -> Tensor:
    """``torch.sum``, ``torch.mean`` or ``torch.amax`` over each tensor of a batch."""
    return how(x, tuple(range(1, x.dim())), keepdim=True)

r"""Weights of a few bits on a uniform grid, with one spacing per output channel.

.. math::

    Q(u) = c\,a\,\frac{\operatorname{round}(q\,u/a)}{q}, \qquad a = \max|u|
    \text{ per output channel}, \qquad q = 2^{\,\text{bits} - 1} - 1 .

There are :math:`2q + 1` levels, symmetric around 0: the most negative number of two's complement is
left out, so that :math:`-u` has the weights :math:`-Q(u)`. A latent halfway between two levels goes
to the even one. The largest latent of a channel is on the last level, so nothing is ever clipped.

The scale :math:`a` is not trained: it follows the latent. With :math:`g` the gradient at
:math:`Q(u)` and the straight-through estimate :math:`\partial \operatorname{round}(x)/\partial x =
1`, the factors :math:`a` and :math:`q` cancel:

.. math:: \delta_i = c\,g_i, \qquad M = c^2 .

No gradient flows through :math:`a`: at most half a level for each weight of the channel, all of it
at the one latent that is the largest.

Source: the grid is that of symmetric integer weights with a scale per channel, as in
Krishnamoorthi, *Quantizing deep convolutional networks for efficient inference*, 2018 (arXiv
1806.08342); the straight-through estimate is from Bengio et al., 2013 (arXiv 1308.3432).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Pullback, Quantizer

__all__ = ["Uniform"]


class Uniform(Quantizer):
    r"""The mirror map of the module's formula."""

    def __init__(self, axis: Sequence[int] = (0,), groups: int = 1, bits: int = 4) -> None:
        super().__init__(axis, groups)
        self.bits = bits

    def quantize(self, state: Mapping[str, Tensor]) -> Tensor:
        a, q = self.by_channel(state["latent"].abs(), torch.amax), 2 ** (self.bits - 1) - 1
        # A channel of zeros has no grid of its own.
        k = (state["latent"] / torch.where(a > 0, a, 1.0) * q).round()
        # k/q first: the last level is then c·a itself. A packed file repeats it to the last bit.
        return torch.where(k == 0, 0.0, state["unit"] * a * (k / k.new_full((), q)))

    def pull_back(self, grad: Tensor, state: Mapping[str, Tensor]) -> dict[str, Pullback]:
        return {"latent": Pullback(state["unit"] * grad, state["unit"].square())}

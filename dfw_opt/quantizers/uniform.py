r"""Weights of a few bits on a uniform grid, with one spacing per output channel.

.. math:: Q(u) = c\,a\,\operatorname{round}(q\,u/a)/q, \quad a = \max|u| \text{ per output channel},

and :math:`q = 2^{\,\text{bits} - 1} - 1`: there are :math:`2q + 1` levels, symmetric around 0, as
the most negative number of two's complement is left out. A latent halfway between two levels goes
to the even one. The largest latent of a channel is on the last level: nothing is ever clipped.

The scale :math:`a` is not trained: it follows the latent. With :math:`g` the gradient at
:math:`Q(u)` and the straight-through estimate :math:`\partial \operatorname{round}(x)/\partial x =
1`, the factors :math:`a` and :math:`q` cancel:

.. math:: \delta_i = c\,g_i, \qquad M = c^2 .

No gradient flows through :math:`a`: it would be at most half a level for each weight of the
channel, all of it at the one latent that is the largest.

Source: Krishnamoorthi, *Quantizing deep convolutional networks for efficient inference*, 2018
(arXiv 1806.08342); for the straight-through estimate Bengio et al., 2013 (arXiv 1308.3432).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Pullback, Quantizer, State


@dataclass
class Uniform(Quantizer):
    bits: int = 4

    def quantize(self, state: State) -> Tensor:
        a, q = self.by_channel(state["latent"].abs(), torch.amax), 2 ** (self.bits - 1) - 1
        # A channel of zeros has no grid of its own.
        k = (state["latent"] / torch.where(a > 0, a, 1.0) * q).round()
        # k/q first: the last level is then c·a itself. A packed file repeats it to the last bit.
        return torch.where(k == 0, 0.0, state["unit"] * a * (k / k.new_full((), q)))

    def pull_back(self, grad: Tensor, state: State) -> dict[str, Pullback]:
        return {"latent": Pullback(state["unit"] * grad, state["unit"].square())}

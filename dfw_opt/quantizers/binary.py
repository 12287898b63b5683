r"""Binary weights with one scale per output channel, as in XNOR-Net.

.. math::

    Q(u) = c\,a\,\operatorname{sign}(u), \qquad a = \text{mean}\,|u| \text{ per output channel},
    \qquad \operatorname{sign}(0) = +1 .

The scale :math:`a` is not trained: it follows the latent. A channel has :math:`n` weights. With
:math:`g` the gradient at :math:`Q(u)`, the straight-through estimate :math:`\partial
\operatorname{sign}(u_i)/\partial u_i = 1`, and the mean over the channels,

.. math::

    \delta_i = c\,\bigl(a + \tfrac1n\bigr)\,g_i, \qquad
    M = c^2\,\text{mean}\Bigl(\bigl(a + \tfrac1n\bigr)(a + 1)\Bigr).

**The pull-back** is that of the paper: what a latent does to its own weight, through the sign and
through the scale. What it does through the scale to the others of its channel is left out: where a
norm follows the layer the scale makes no difference, and elsewhere it would be one and the same
number for all latents of a sign, and push the scale far beyond where it should be.

**The metric** is the one with which no weights move farther than SGD would move them: a step
:math:`-M^{-1}\delta` changes the part of the weights along :math:`\operatorname{sign}(u)`, which
the scale moves as well, by :math:`-g` times :math:`c^2(a + \tfrac1n)(a + 1)/M`.

The usual factor :math:`\mathbb 1[|u_i| \le R]` is always 1, because latents are kept in the box.

Source: Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279), Section 3.1; the metric is ours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Pullback, Quantizer

__all__ = ["Binary"]


class Binary(Quantizer):
    r"""The mirror map :math:`Q(u) = c\,a\,\operatorname{sign}(u)`."""

    def quantize(self, state: Mapping[str, Tensor]) -> Tensor:
        level = state["unit"] * self.by_channel(state["latent"].abs(), torch.mean)
        return torch.where(state["latent"] >= 0, level, -level)

    def pull_back(self, grad: Tensor, state: Mapping[str, Tensor]) -> dict[str, Pullback]:
        c, a = state["unit"], self.by_channel(state["latent"].abs(), torch.mean)
        own = a + 1 / self.channel_size(grad)
        squares = (own * (a + 1)).mean(tuple(range(1, a.dim())), keepdim=True)
        return {"latent": Pullback(c * own * grad, c.square() * squares)}

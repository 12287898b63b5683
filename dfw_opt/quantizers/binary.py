r"""Binary weights with one scale per output channel, as in XNOR-Net.

.. math:: Q(u) = c\,a\,\operatorname{sign}(u), \quad a = \text{mean}|u| \text{ per output channel},

:math:`\operatorname{sign}(0) = +1`. The scale :math:`a` is not trained: it follows the latent. With
:math:`g` the gradient at :math:`Q(u)`, the straight-through estimate :math:`\partial
\operatorname{sign}(u_i)/\partial u_i = 1`, :math:`n` weights a channel, the mean over channels,

.. math:: \delta_i = c\,(a + \tfrac1n)\,g_i, \quad M = c^2\,\text{mean}[(a + \tfrac1n)(a + 1)] .

**The pull-back** is that of the paper: what a latent does to its own weight, through the sign and
through the scale. What it does through the scale to the others of its channel is left out: it is
the same number for all latents of a sign, and would push the scale far beyond where it should be.

**The metric** is the one with which no weights move farther than SGD would move them: the part
along :math:`\operatorname{sign}(u)`, which the scale moves as well, moves by :math:`-g` times
:math:`c^2(a + \tfrac1n)(a + 1)/M`.

Source: Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279), Section 3.1; its factor
:math:`\mathbb 1[|u_i| \le R]` is always 1 in the box. The metric is ours.
"""

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Pullback, Quantizer, State, by_tensor


class Binary(Quantizer):
    def quantize(self, state: State) -> Tensor:
        level = state["unit"] * self.by_channel(state["latent"].abs(), torch.mean)
        return torch.where(state["latent"] >= 0, level, -level)

    def pull_back(self, grad: Tensor, state: State) -> dict[str, Pullback]:
        c, a = state["unit"], self.by_channel(state["latent"].abs(), torch.mean)
        own = a + 1 / self.channel_size(grad)
        metric = c.square() * by_tensor(own * (a + 1), torch.mean)
        return {"latent": Pullback(c * own * grad, metric)}

r"""Binary weights with one scale per output channel, as in XNOR-Net.

.. math::

    Q(u) = c\,a\,\operatorname{sign}(u), \qquad a = \text{mean}\,|u| \text{ per output channel},
    \qquad \operatorname{sign}(0) = +1 .

The channel is the first dimension of the weight (of a transposed convolution that is its *input*
channel), and has :math:`n` weights. The scale :math:`a` is not trained: it follows the latent. With
:math:`g` the gradient at :math:`Q(u)`, the straight-through estimate :math:`\partial
\operatorname{sign}(u_i)/\partial u_i = 1`, and the mean over the channels,

.. math::

    \delta_i = c\,\bigl(a + \tfrac1n\bigr)\,g_i, \qquad
    M = c^2\,\text{mean}\Bigl(\bigl(a + \tfrac1n\bigr)(a + 1)\Bigr).

**The pull-back** is that of the paper: what a latent does to its own weight, through the sign and
through the scale. Left out is what it does through the scale to the others of its channel,
:math:`\operatorname{sign}(u_i)\,\tfrac cn \sum_{j \ne i} g_j\operatorname{sign}(u_j)`. Where a norm
follows the layer, the scale makes no difference to the loss, and that is :math:`-\tfrac cn g_i`.
Elsewhere it is the same number for all latents of one sign: together they would push the scale far
beyond where it should be.

**The metric** is the one with which no weights move farther than SGD would move them, on average
over the channels. Let :math:`s = \operatorname{sign}(u)`, of one channel. A step
:math:`-M^{-1}\delta` changes the part of the weights across :math:`s`, where signs would flip, by
:math:`-g` times :math:`c^2(a + \tfrac1n)\,a/M`, and the part along :math:`s`, which the scale moves
as well, by :math:`-g` times :math:`c^2(a + \tfrac1n)(a + 1)/M`: which is :math:`-g` if all channels
have the same :math:`a`. A metric of the first part alone, :math:`c^2a^2`, makes the second
:math:`(a + 1)/a` times too long, and networks without norms unstable.

The usual factor :math:`\mathbb 1[|u_i| \le R]` is always 1, because the optimizer keeps latents in
the box.

Source: Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279), Section 3.1; the metric is ours.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Group, Option, Pulled, Quantizer, State, normalised_latent
from dfw_opt.sharding import settled

__all__ = ["BINARY", "mean_magnitude", "pull_back", "quantize"]


def mean_magnitude(latent: Tensor) -> Tensor:
    """:math:`a`, the mean of :math:`|u|` per channel, shape ``(channels, 1, ...)``."""
    return _channel_mean(latent.abs())


def quantize(latent: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    r""":math:`Q(u) = c\,a\,\operatorname{sign}(u)`.

    Args:
        latent: :math:`u`, shape ``(channels, ...)``, at least 2-D.
        unit: :math:`c`, 0-dim.
        scale: :math:`a`, of :func:`mean_magnitude`.
    """
    level = unit * scale
    return torch.where(latent >= 0, level, -level)


def pull_back(grad: Tensor, latent: Tensor, unit: Tensor, scale: Tensor) -> Pulled:
    r""":math:`d = M^{-1}\delta` and :math:`M`.

    Args:
        grad: :math:`g`, the loss gradient at :math:`Q(u)`, the shape of ``latent``.
        latent: :math:`u`.
        unit: :math:`c`, 0-dim.
        scale: :math:`a`, of :func:`mean_magnitude`.
    """
    n = max(1, math.prod(latent.shape[1:]))
    own = scale + 1 / n
    squares = settled((own * (scale + 1)).sum()) / max(1, scale.numel())
    return Pulled(own * grad.to(latent.dtype) / (unit * squares), unit.square() * squares)


def _channel_mean(x: Tensor) -> Tensor:
    # Not mean(), whose result for an empty channel is NaN.
    total = settled(x.sum(dim=tuple(range(1, x.dim())), keepdim=True))
    return total / max(1, math.prod(x.shape[1:]))


class _Binary:
    variables: Mapping[str, tuple[float, float] | None] = {"latent": None}
    derived = ("scale",)
    options: tuple[Option, ...] = ()

    def start(self, weight: Tensor, group: Group) -> State:
        latent, unit = normalised_latent(weight, group["radius"])
        return {"latent": latent, "unit": unit, "scale": mean_magnitude(latent)}

    def derive(self, state: State, group: Group) -> State:
        return {"scale": mean_magnitude(state["latent"])}

    def quantize(self, state: State, group: Group) -> Tensor:
        return quantize(state["latent"], state["unit"], state["scale"])

    def pull_back(self, grad: Tensor, state: State, group: Group) -> dict[str, Pulled]:
        return {"latent": pull_back(grad, state["latent"], state["unit"], state["scale"])}


BINARY: Quantizer = _Binary()

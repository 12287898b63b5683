r"""Binary weights with one scale per output channel, as in XNOR-Net.

.. math::

    Q(u) = c\,a\,\operatorname{sign}(u), \qquad a = \text{mean}\,|u| \text{ per output channel},
    \qquad \operatorname{sign}(0) = +1 .

The channel is the first dimension of the weight. The scale :math:`a` is not trained: it follows the
latent, and the pull-back runs through it. With :math:`g` the gradient at :math:`Q(u)` and the
straight-through estimate :math:`\partial \operatorname{sign}(u_i)/\partial u_i = 1`,

.. math::

    \delta_i = c\,\Bigl(a\,g_i + \operatorname{sign}(u_i)\,\tfrac1n
        \textstyle\sum_j g_j \operatorname{sign}(u_j)\Bigr), \qquad
    M = c^2\,\text{mean}\Bigl(a^2 + \tfrac{2a + 1}{n}\Bigr),

the sum over the :math:`n` weights of the channel, the mean over the channels. A unit step of
:math:`u_i` moves its own weight by :math:`c\,(a + \tfrac1n)` and the others by
:math:`\tfrac cn`: summed squares of these are :math:`M`. The usual factor
:math:`\mathbb 1[|u_i| \le R]` is always 1, because the optimizer keeps latents in the box.

Source: Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279), Section 3.1; the gradient there,
:math:`g_i(1/n + \alpha\mathbb 1)`, drops the sum over the channel, which the chain rule keeps.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Group, Option, Pulled, Quantizer, State, normalised_latent
from dfw_opt.sharding import settled
from dfw_opt.sign import sign

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
    g = grad.to(latent.dtype)
    signs = sign(latent)
    through_scale = signs * _channel_mean(g * signs)
    n = max(1, math.prod(latent.shape[1:]))
    change = scale.square() + (2 * scale + 1) / n
    mean_change = settled(change.sum()) / max(1, scale.numel())
    return Pulled((scale * g + through_scale) / (unit * mean_change), unit.square() * mean_change)


def _channel_mean(x: Tensor) -> Tensor:
    # Not mean(), whose result for an empty channel is NaN.
    total = settled(x.sum(dim=tuple(range(1, x.dim())), keepdim=True))
    return total / max(1, math.prod(x.shape[1:]))


class _Binary:
    variables: Mapping[str, tuple[float, float] | None] = {"latent": None}
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

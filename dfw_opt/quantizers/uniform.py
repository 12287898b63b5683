r"""Weights of a few bits on a uniform grid, with one spacing per output channel.

.. math::

    Q(u) = c\,a\,\frac{\operatorname{round}(q\,u/a)}{q}, \qquad a = \max|u|
    \text{ per output channel}, \qquad q = 2^{\,\text{bits} - 1} - 1 .

The channel is the first dimension of the weight; of a transposed convolution that is its *input*
channel. There are :math:`2q + 1` levels, symmetric around 0: the most negative number of two's
complement is left out, so that :math:`-u` has the weights :math:`-Q(u)`. A latent halfway
between two levels goes to the even one.

The largest latent of a channel is on the last level, whatever it is, so nothing is ever clipped.
The scale :math:`a` is not trained: it follows the latent. With :math:`g` the gradient at
:math:`Q(u)` and the straight-through estimate :math:`\partial \operatorname{round}(x)/\partial x =
1`, the factors :math:`a` and :math:`q` cancel:

.. math:: \delta_i = c\,g_i, \qquad M = c^2 .

No gradient flows through :math:`a`. It would be the sum over the channel of :math:`c\,g_j` times
the rounding error of each weight, at most half a level, and all of it at the one latent that is
the largest.

Source: the grid is that of symmetric integer weights with a scale per channel, as in
Krishnamoorthi, *Quantizing deep convolutional networks for efficient inference*, 2018 (arXiv
1806.08342); the straight-through estimate is from Bengio et al., 2013 (arXiv 1308.3432).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Group, Option, Pulled, Quantizer, State, normalised_latent
from dfw_opt.sharding import largest_of_rows

__all__ = [
    "UNIFORM",
    "largest_of_channel",
    "level",
    "levels_beyond_zero",
    "nearest",
    "pull_back",
    "quantize",
]


def levels_beyond_zero(bits: int) -> int:
    r""":math:`q = 2^{\,\text{bits} - 1} - 1`, the levels on either side of 0."""
    return (1 << (bits - 1)) - 1


def largest_of_channel(latent: Tensor) -> Tensor:
    """:math:`a`, the largest :math:`|u|` per channel, shape ``(channels, 1, ...)``."""
    return largest_of_rows(latent)


def nearest(latent: Tensor, largest: Tensor, bits: int) -> Tensor:
    r""":math:`k = \operatorname{round}(q\,u/a)`, the number of the nearest level."""
    # A channel of zeros has no grid of its own.
    return (latent / torch.where(largest > 0, largest, 1.0) * levels_beyond_zero(bits)).round()


def level(k: Tensor, top: Tensor, bits: int) -> Tensor:
    """Level :math:`k` of those up to ``top``; a packed file repeats it to the last bit."""
    # k/q first: the last level is then the top itself, and the others follow from it.
    # By a tensor: an accelerator would multiply by the reciprocal of a number, and round elsewhere.
    return torch.where(k == 0, 0.0, top * (k / k.new_full((), levels_beyond_zero(bits))))


def quantize(latent: Tensor, unit: Tensor, largest: Tensor, bits: int) -> Tensor:
    r""":math:`Q(u)` of the module's formula.

    Args:
        latent: :math:`u`, shape ``(channels, ...)``, at least 2-D.
        unit: :math:`c`, 0-dim.
        largest: :math:`a`, of :func:`largest_of_channel`.
        bits: 2 to 8.
    """
    return level(nearest(latent, largest, bits), unit * largest, bits)


def pull_back(grad: Tensor, latent: Tensor, unit: Tensor) -> Pulled:
    r""":math:`d = M^{-1}\delta` and :math:`M`.

    Args:
        grad: :math:`g`, the loss gradient at :math:`Q(u)`, the shape of ``latent``.
        latent: :math:`u`.
        unit: :math:`c`, 0-dim.
    """
    return Pulled(grad.to(latent.dtype) / unit, unit.square())


class _Uniform:
    variables: Mapping[str, tuple[float, float] | None] = {"latent": None}
    derived = ("largest",)
    options: tuple[Option, ...] = (
        Option(
            "bits",
            lambda x: isinstance(x, int) and 2 <= x <= 8,
            'a whole number from 2 to 8; for 1 bit, quantizer="binary"',
            "ProjectedDFW",
        ),
    )

    def start(self, weight: Tensor, group: Group) -> State:
        latent, unit = normalised_latent(weight, group["radius"])
        return {"latent": latent, "unit": unit, "largest": largest_of_channel(latent)}

    def derive(self, state: State, group: Group) -> State:
        return {"largest": largest_of_channel(state["latent"])}

    def quantize(self, state: State, group: Group) -> Tensor:
        return quantize(state["latent"], state["unit"], state["largest"], group["bits"])

    def pull_back(self, grad: Tensor, state: State, group: Group) -> dict[str, Pulled]:
        return {"latent": pull_back(grad, state["latent"], state["unit"])}


UNIFORM: Quantizer = _Uniform()

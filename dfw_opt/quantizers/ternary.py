r"""Ternary weights with two trained scales per tensor, as in Trained Ternary Quantization.

.. math::

    Q(u) = \begin{cases} \phantom{-}c\,W_p & u > \Delta \\ \phantom{-}0 & |u| \le \Delta \\
        -c\,W_n & u < -\Delta \end{cases} \qquad \Delta = t \cdot \max|u| .

:math:`W_p, W_n > 0` start as the mean of :math:`|u|` beyond :math:`\Delta` on their side and are
trained in the same step as the latent. With :math:`g` the gradient at :math:`Q(u)`,

.. math::

    \delta_{W_p} &= c \sum_{u > \Delta} g, & M &= c^2 n_+, \\
    \delta_{W_n} &= -c \sum_{u < -\Delta} g, & M &= c^2 n_-, \\
    \delta_{u} &= c\,(W_p\,g,\ g,\ W_n\,g) \text{ in the three zones},
        & M &= c^2\,(n_+ W_p^2 + n_0 + n_- W_n^2) / n,

with :math:`n_+, n_0, n_-` the numbers of weights in the zones, :math:`n` their sum. In the metric
:math:`M` a scale moves by the *mean* gradient of its zone. No gradient flows through
:math:`\Delta`.

Source: Zhu et al., *Trained Ternary Quantization*, ICLR 2017 (arXiv 1612.01064), equations (6) to
(8). Equation (7) lacks the minus of :math:`\delta_{W_n}`, without which the scale ascends.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dfw_opt.quantizers.base import Group, Option, Pulled, Quantizer, State, normalised_latent
from dfw_opt.sharding import largest, settled

__all__ = ["SCALE_MIN", "TERNARY", "pull_back", "quantize", "threshold_of"]

SCALE_MIN = 1e-3
"""The least value of a scale, in units of :math:`c`: two levels must never share a sign."""


def threshold_of(latent: Tensor, threshold: float) -> Tensor:
    r""":math:`\Delta = t \cdot \max|u|`, 0-dim."""
    return threshold * largest(latent)


def quantize(
    latent: Tensor, unit: Tensor, scale_pos: Tensor, scale_neg: Tensor, delta: Tensor
) -> Tensor:
    r""":math:`Q(u)` of the module's first formula.

    Args:
        latent: :math:`u`, any shape.
        unit: :math:`c`, 0-dim.
        scale_pos: :math:`W_p`, 0-dim.
        scale_neg: :math:`W_n`, 0-dim.
        delta: :math:`\Delta`, of :func:`threshold_of`.
    """
    positive, negative = _zones(latent, delta)
    zero = torch.zeros_like(unit)
    return torch.where(positive, unit * scale_pos, torch.where(negative, -unit * scale_neg, zero))


def pull_back(
    grad: Tensor,
    latent: Tensor,
    unit: Tensor,
    scale_pos: Tensor,
    scale_neg: Tensor,
    delta: Tensor,
) -> dict[str, Pulled]:
    r""":math:`d = M^{-1}\delta` and :math:`M` of ``latent``, ``scale_pos`` and ``scale_neg``.

    Args:
        grad: :math:`g`, the loss gradient at :math:`Q(u)`, the shape of ``latent``.
        latent: :math:`u`.
        unit: :math:`c`, 0-dim.
        scale_pos: :math:`W_p`, 0-dim.
        scale_neg: :math:`W_n`, 0-dim.
        delta: :math:`\Delta`, of :func:`threshold_of`.
    """
    g = grad.to(latent.dtype)
    positive, negative = _zones(latent, delta)
    sums = [(g * positive).sum(), (g * negative).sum(), positive.sum(), negative.sum()]
    # Together, so that they are one message if the tensor is sharded.
    g_pos, g_neg, n_pos, n_neg = settled(torch.stack([x.to(g.dtype) for x in sums])).unbind()
    n_zero = latent.numel() - n_pos - n_neg
    change = n_pos * scale_pos.square() + n_zero + n_neg * scale_neg.square()
    mean_change = change / max(1, latent.numel())
    # An empty zone has gradient 0; counting one weight in it keeps M positive.
    n_pos, n_neg = n_pos.clamp(min=1), n_neg.clamp(min=1)
    factor = torch.where(positive, scale_pos, torch.where(negative, scale_neg, 1.0))
    return {
        "latent": Pulled(factor * g / (unit * mean_change), unit.square() * mean_change),
        "scale_pos": Pulled(g_pos / (unit * n_pos), unit.square() * n_pos),
        "scale_neg": Pulled(-g_neg / (unit * n_neg), unit.square() * n_neg),
    }


def _zones(latent: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return latent > delta, latent < -delta


def _starting_scale(latent: Tensor, zone: Tensor) -> Tensor:
    mean = (latent.abs() * zone).sum() / zone.sum().clamp(min=1)
    return mean.clamp(min=SCALE_MIN)


class _Ternary:
    variables: Mapping[str, tuple[float, float] | None] = {
        "latent": None,
        "scale_pos": (SCALE_MIN, math.inf),
        "scale_neg": (SCALE_MIN, math.inf),
    }
    derived = ("delta",)
    options: tuple[Option, ...] = (
        Option("threshold", lambda x: 0 <= x < 1, "in [0, 1)", "TernaryDFW"),
    )

    def start(self, weight: Tensor, group: Group) -> State:
        latent, unit = normalised_latent(weight, group["radius"])
        delta = threshold_of(latent, group["threshold"])
        positive, negative = _zones(latent, delta)
        return {
            "latent": latent,
            "unit": unit,
            "delta": delta,
            "scale_pos": _starting_scale(latent, positive),
            "scale_neg": _starting_scale(latent, negative),
        }

    def derive(self, state: State, group: Group) -> State:
        return {"delta": threshold_of(state["latent"], group["threshold"])}

    def quantize(self, state: State, group: Group) -> Tensor:
        return quantize(*_arguments(state))

    def pull_back(self, grad: Tensor, state: State, group: Group) -> dict[str, Pulled]:
        return pull_back(grad, *_arguments(state))


def _arguments(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    u, c, W_p, W_n = (state[key] for key in ("latent", "unit", "scale_pos", "scale_neg"))
    return u, c, W_p, W_n, state["delta"]


TERNARY: Quantizer = _Ternary()

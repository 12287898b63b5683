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

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfw_opt.quantizers.base import SCALE_MIN, Pullback, Quantizer, State

__all__ = ["Ternary"]


class Ternary(Quantizer):
    """The mirror map of the module's first formula."""

    scales = ("scale_pos", "scale_neg")
    leveled = False

    def __init__(
        self, axis: Sequence[int] = (0,), groups: int = 1, threshold: float = 0.05
    ) -> None:
        super().__init__(axis, groups)
        self.threshold = threshold

    def starting_scales(self, latent: Tensor) -> State:
        magnitude, means = latent.abs(), []
        for zone in self._zones(latent):
            count = _total(zone.to(latent)).clamp(min=1)
            means.append((_total(magnitude * zone) / count).clamp(min=SCALE_MIN))
        return dict(zip(self.scales, means, strict=True))

    def quantize(self, state: Mapping[str, Tensor]) -> Tensor:
        c, W_p, W_n = (state[key] for key in ("unit", *self.scales))
        above, below = self._zones(state["latent"])
        return torch.where(above, c * W_p, torch.where(below, -c * W_n, 0.0))

    def pull_back(self, grad: Tensor, state: Mapping[str, Tensor]) -> dict[str, Pullback]:
        c, W_p, W_n = (state[key] for key in ("unit", *self.scales))
        above, below = self._zones(state["latent"])
        slope = torch.where(above, W_p, torch.where(below, W_n, 1.0))
        n = grad[0].numel()
        # An empty zone has gradient 0; counting one weight in it keeps M positive.
        n_p, n_n = (_total(zone.to(grad)).clamp(min=1) for zone in (above, below))
        return {
            "latent": Pullback(c * slope * grad, c.square() * _total(slope.square()) / n),
            "scale_pos": _flat(c * _total(grad * above), c.square() * n_p),
            "scale_neg": _flat(-c * _total(grad * below), c.square() * n_n),
        }

    def _zones(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        largest = latent.abs().amax(tuple(range(1, latent.dim())), keepdim=True)
        return latent > self.threshold * largest, latent < -self.threshold * largest


def _total(x: Tensor) -> Tensor:
    """The sum over each tensor of a batch."""
    return x.sum(tuple(range(1, x.dim())), keepdim=True)


def _flat(*of_scale: Tensor) -> Pullback:
    """As the scales are: a number for each tensor of the batch."""
    return Pullback(*(x.flatten() for x in of_scale))

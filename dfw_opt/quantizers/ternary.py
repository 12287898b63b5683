r"""Ternary weights with two trained scales per tensor, as in Trained Ternary Quantization.

.. math::

    Q(u) = \begin{cases} \phantom{-}c\,W_p & u > \Delta \\ \phantom{-}0 & |u| \le \Delta \\
        -c\,W_n & u < -\Delta \end{cases} \qquad
    \Delta = t \cdot \max|u| \ \text{ or, by default, }\ 0.7 \cdot \text{mean}\,|u| .

:math:`W_p, W_n > 0` start as the mean of :math:`|u|` beyond :math:`\Delta` on their side and are
trained in the same step as the latent. With :math:`g` the gradient at :math:`Q(u)`,

.. math::

    \delta_{W_p} &= c \sum_{u > \Delta} g, \quad M = c^2 n_+, \\
    \delta_{W_n} &= -c \sum_{u < -\Delta} g, \quad M = c^2 n_-, \\
    \delta_{u} &= c\,(W_p\,g,\ s\,g,\ W_n\,g) \text{ in the three zones}, \\
    M &= c^2\,(n_+ W_p^2 + n_0 s^2 + n_- W_n^2) / n,

with :math:`n_+, n_0, n_-, n` the numbers of weights in the zones and in all. So a scale moves by
the *mean* gradient of its zone. In the Euclidean norm :math:`s = 1`, more than the other slopes,
and :math:`t = 0.05` by default, as in the paper. In the spectral norm :math:`s` is the mean of the
others, or the weights near zero would turn the direction of all.

Sources: Zhu et al., *Trained Ternary Quantization*, ICLR 2017 (arXiv 1612.01064), equations (6) to
(8), with the minus that (7) lacks. Li, Liu, *Ternary Weight Networks*, 2016 (arXiv 1605.04711).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfw_opt.quantizers.base import SCALE_MIN, Pullback, Quantizer, State, by_tensor


@dataclass
class Ternary(Quantizer):
    threshold: float | None = None
    scales = ("scale_pos", "scale_neg")
    leveled = False

    def starting_scales(self, latent: Tensor) -> State:
        means = {
            key: by_tensor(latent.abs() * zone, torch.sum) / _count(zone)
            for key, zone in zip(self.scales, self._zones(latent), strict=True)
        }
        return {key: mean.clamp(min=SCALE_MIN) for key, mean in means.items()}

    def quantize(self, state: State) -> Tensor:
        c, W_p, W_n = (state[key] for key in ("unit", *self.scales))
        above, below = self._zones(state["latent"])
        return torch.where(above, c * W_p, torch.where(below, -c * W_n, 0.0))

    def pull_back(self, grad: Tensor, state: State) -> dict[str, Pullback]:
        c, W_p, W_n = (state[key] for key in ("unit", *self.scales))
        above, below = self._zones(state["latent"])
        between = (W_p + W_n) / 2 if self.norm == "spectral" else 1.0
        slope = torch.where(above, W_p, torch.where(below, W_n, between))
        mean = by_tensor(slope.square(), torch.sum) / grad[0].numel()
        pulled = {"latent": Pullback(c * slope * grad, c.square() * mean)}
        for key, factor, zone in (("scale_pos", c, above), ("scale_neg", -c, below)):
            delta = factor * by_tensor(grad * zone, torch.sum)
            pulled[key] = Pullback(delta.flatten(), (c.square() * _count(zone)).flatten())
        return pulled

    def _zones(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        size, t = latent.abs(), self.threshold
        if t is None and self.norm == "spectral":
            # In float64, which MPS lacks: alone and in a batch a tensor has one sum, to the bit.
            wide = size if size.is_mps else size.double()
            delta = (by_tensor(wide, torch.sum) * (0.7 / latent[0].numel())).to(size.dtype)
        else:
            delta = (0.05 if t is None else t) * by_tensor(size, torch.amax)
        beyond = size > delta
        return beyond & (latent > 0), beyond & (latent < 0)


def _count(zone: Tensor) -> Tensor:
    """Of an empty zone 1, which keeps M positive; its sums are 0."""
    return by_tensor(zone, torch.sum).clamp(min=1)

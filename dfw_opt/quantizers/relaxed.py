r"""Relaxed weights: on the way from float weights to quantized ones.

With the relaxation :math:`\theta` of its group, from 1 for float weights to 0, a parameter holds

.. math:: Q_\theta(u) = (1 - \theta)\,Q(u) + \theta\,c\,u .

**The pull-back** of the gradient :math:`g` at :math:`Q_\theta(u)` mixes in the same way that of the
quantizer, :math:`\delta`, and that of :math:`c\,u`; so do their lengths, the roots of the metric:

.. math::

    \delta_\theta = (1 - \theta)\,\delta + \theta\,c\,g, \qquad
    \sqrt{M_\theta} = (1 - \theta)\sqrt M + \theta\,c .

By the triangle inequality a unit step of a latent moves its weight, straight through the levels,
by no more than :math:`\sqrt{M_\theta}` (the root of the mean square over the tensor). A scale
keeps its metric and has :math:`(1 - \theta)` times the gradient.

Source: Yin et al., *BinaryRelax*, SIAM J. Imaging Sciences 11(4), 2018 (arXiv 1801.06313), with
:math:`\lambda = (1 - \theta)/\theta`, whose growth there is geometric; the metric is ours.
"""

from torch import Tensor

from dfw_opt.quantizers.base import Pullback, Quantizer, State


class Relaxed(Quantizer):
    def __init__(self, hard: Quantizer, relaxation: float) -> None:
        super().__init__(hard.axis, hard.groups, hard.norm)
        self.hard, self.relaxation = hard, relaxation
        self.scales, self.leveled = hard.scales, hard.leveled
        self.starting_scales = hard.starting_scales  # type: ignore[method-assign]

    def quantize(self, state: State) -> Tensor:
        theta = self.relaxation
        return (1 - theta) * self.hard.quantize(state) + theta * state["unit"] * state["latent"]

    def pull_back(self, grad: Tensor, state: State) -> dict[str, Pullback]:
        theta, c, pulled = self.relaxation, state["unit"], self.hard.pull_back(grad, state)
        delta, M = pulled.pop("latent")
        root = (1 - theta) * (c.square() if M is None else M).sqrt() + theta * c
        scales = {key: Pullback((1 - theta) * d, metric) for key, (d, metric) in pulled.items()}
        return {"latent": Pullback((1 - theta) * delta + theta * c * grad, root.square()), **scales}

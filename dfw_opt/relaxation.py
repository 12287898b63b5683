r"""Relaxed weights: on the way from float weights to quantized ones.

With the relaxation :math:`\theta \in [0, 1]` of its group, a quantized parameter holds

.. math:: Q_\theta(u) = (1 - \theta)\,Q(u) + \theta\,c\,u ,

at :math:`\theta = 1` its float weights, at :math:`\theta = 0` the quantized ones. The network
learns as a float one at first, and gets used to its levels while :math:`\theta` falls; latents and
their momentum stay.

**The pull-back** of the gradient :math:`g` at :math:`Q_\theta(u)` mixes in the same way that of the
quantizer, :math:`\delta`, and that of :math:`c\,u`; so do their lengths, the roots of the metric:

.. math::

    \delta_\theta = (1 - \theta)\,\delta + \theta\,c\,g, \qquad
    \sqrt{M_\theta} = (1 - \theta)\sqrt M + \theta\,c .

By the triangle inequality a unit step of a latent still moves its own weight, straight through the
levels, by no more than :math:`\sqrt{M_\theta}` (the root of the mean square over the tensor). At
:math:`\theta = 1` the step is that of a float parameter in the box :math:`[-cR, cR]`. A scale moves
:math:`(1 - \theta)` times as far, in its own metric: where it has no part in the weights, nothing
but the momentum that it has left moves it.

Source: Yin, Zhang, Lyu, Osher, Qi, Xin, *BinaryRelax*, SIAM J. Imaging Sciences 11(4), 2018 (arXiv
1801.06313), with :math:`\lambda = (1 - \theta)/\theta`, whose growth there is geometric; the metric
is ours.
"""

from torch import Tensor

from dfw_opt.quantizers import QUANTIZERS, Group, Pulled, State
from dfw_opt.sharding import settled

__all__ = ["pull_back", "quantize", "relaxation_of"]


def relaxation_of(group: Group) -> float:
    r""":math:`\theta`; 0 for a group that is not quantized."""
    return 0.0 if group.get("quantizer") is None else float(group.get("relaxation", 0.0))


def quantize(state: State, group: Group) -> Tensor:
    r""":math:`Q_\theta(u)`, in the dtype of the state."""
    weight, theta = QUANTIZERS[group["quantizer"]].quantize(state, group), relaxation_of(group)
    if theta == 0:
        return weight
    return (1 - theta) * weight + theta * state["unit"] * state["latent"]


def pull_back(grad: Tensor, state: State, group: Group) -> dict[str, Pulled]:
    r""":math:`M_\theta^{-1}\delta_\theta` and :math:`M_\theta` of every variable."""
    pulled = QUANTIZERS[group["quantizer"]].pull_back(grad, state, group)
    theta = relaxation_of(group)
    if theta == 0:
        return pulled
    unit, (d, M) = state["unit"], pulled.pop("latent")
    M = unit.new_ones(()) if M is None else settled(M)
    root = (1 - theta) * M.sqrt() + theta * unit
    delta = (1 - theta) * M * d + theta * unit * grad.to(d.dtype)
    scales = {key: Pulled((1 - theta) * own, metric) for key, (own, metric) in pulled.items()}
    return {"latent": Pulled(delta / root.square(), root.square()), **scales}

r"""Quantizers: how a latent becomes a weight, and a weight's gradient the latent's.

Training quantized weights by their latents is mirror descent: gradients move the *dual variable*,
the latent :math:`u`; the *mirror map* :math:`Q`, the quantizer, takes it to the weights that the
network is evaluated at. The pull-back takes the gradient at :math:`Q(u)`, straight through the
rounding, to the gradient :math:`\delta` of each variable that is trained.

**The metric.** A unit step of a latent changes its weight by about the size of a level, one of a
shared scale changes thousands of weights at once. In the Euclidean norm a step is measured by the
change that it makes in the weights, :math:`\|\cdot\|_M^2 = M\|\cdot\|^2`, so that one learning rate
serves them all; :math:`M`, the squared change per unit step, is 1 for a float parameter.
"""

from collections.abc import Mapping
from typing import Any

from dfw_opt.quantizers.base import SCALE_MIN, Pullback, Quantizer, State
from dfw_opt.quantizers.binary import Binary
from dfw_opt.quantizers.relaxed import Relaxed
from dfw_opt.quantizers.ternary import Ternary
from dfw_opt.quantizers.uniform import Uniform

__all__ = ["QUANTIZERS", "SCALE_MIN", "Pullback", "Quantizer", "State", "quantizer_of"]

QUANTIZERS: dict[str, tuple[type[Quantizer], tuple[str, ...]]] = {
    "binary": (Binary, ()),
    "ternary": (Ternary, ("threshold",)),
    "uniform": (Uniform, ("bits",)),
}
"""Every quantizer by its name, the ``quantizer`` key of a group, with the group keys of its own. A
new one is a file with a :class:`~dfw_opt.quantizers.base.Quantizer`, and a line here."""


def quantizer_of(group: Mapping[str, Any]) -> Quantizer | None:
    """The quantizer that the keys of a parameter group describe; ``None`` for a float group."""
    if group.get("quantizer") is None:
        return None
    kind, keys = QUANTIZERS[group["quantizer"]]
    axis, theta, own = group["scale_axis"], group["relaxation"], {key: group[key] for key in keys}
    axes = axis if isinstance(axis, tuple) else (axis,)
    quantizer = kind(axes, group["scale_groups"], group["norm"], **own)
    return Relaxed(quantizer, theta) if theta else quantizer

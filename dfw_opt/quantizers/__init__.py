r"""Quantizers: how a latent becomes a weight, and a weight's gradient the latent's.

A quantizer is, in essence, three things: the state that it keeps for a parameter (a normalised
latent :math:`u` and whatever else it trains), the map :math:`Q` from that state to the weights the
network sees, and the pull-back of the gradient at :math:`Q` to the gradient of each trained
variable.

**The metric.** A unit step of a latent changes its weight by about the size of a level of the layer
(straight through the rounding); one of a shared scale changes thousands of weights at once. So that
one learning rate serves them all, a step of a variable :math:`v` is measured by the change that it
makes in the weights: :math:`\|\cdot\|_M^2 = M\|\cdot\|^2`, with :math:`M` the squared change per
unit step: 1 for a float parameter, one number for all latents of a tensor. How they are counted
together is each quantizer's to say. Pull-backs therefore return :math:`d = M^{-1}\delta`, the
gradient in that metric, together with :math:`M`; all inner products in the step size are
:math:`\langle\cdot,\cdot\rangle_M`.

To add a quantizer, write one file with an object of type
:class:`~dfw_opt.quantizers.base.Quantizer` and enter it in :data:`QUANTIZERS`.
"""

from dfw_opt.quantizers.base import Group, Option, Pulled, Quantizer, State
from dfw_opt.quantizers.binary import BINARY
from dfw_opt.quantizers.ternary import TERNARY
from dfw_opt.quantizers.uniform import UNIFORM

__all__ = ["QUANTIZERS", "Group", "Option", "Pulled", "Quantizer", "State"]

QUANTIZERS: dict[str, Quantizer] = {"binary": BINARY, "ternary": TERNARY, "uniform": UNIFORM}
"""Every quantizer by the name that a parameter group gives in its ``quantizer`` key."""

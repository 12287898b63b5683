"""The baselines for AdamW and SGD: ternary Linear layers as in BitNet b1.58.

That is how ternary language models are trained today (Ma et al., arXiv 2402.17764): float weights,
rounded in every forward pass, with a gradient that ignores the rounding. BitNet rounds activations
to 8 bits too; here they stay float for all optimizers, as only the weights are to be compared.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-5  # as in BitNet


class TernaryLinear(nn.Linear):
    """Computes with ``s * round(clip(w / s, -1, 1))``, where ``s`` is the mean of ``|w|``."""

    @classmethod
    def replacing(cls, linear: nn.Linear) -> Self:
        """A layer that has the parameters of ``linear``."""
        layer = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    @torch.no_grad()
    def quantized(self) -> Tensor:
        """The weights that the network computes with."""
        scale = self.weight.abs().mean().clamp_min(_EPS)
        return scale * (self.weight / scale).clamp(-1, 1).round()

    def forward(self, x: Tensor) -> Tensor:
        # The values of the quantized weights, with the derivative of the identity.
        weight = self.weight + (self.quantized() - self.weight).detach()
        return functional.linear(x, weight, self.bias)


def convert(model: nn.Module) -> None:
    """Replace every Linear layer inside ``model`` by a ternary one with the same weights."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, TernaryLinear.replacing(child))


def layers(model: nn.Module) -> list[TernaryLinear]:
    """The straight-through layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, TernaryLinear)]

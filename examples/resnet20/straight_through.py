"""The baselines: layers that hold latent weights and quantize them in every forward pass.

This is the usual way to train binary and ternary networks. Latents are matrices, as Muon wants.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


class LatentConv2d(nn.Module):
    """A convolution without bias that computes with ``quantized()``; here that is the latent."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.shape, self.stride, self.padding = conv.weight.shape, conv.stride, conv.padding
        self.latent = nn.Parameter(conv.weight.detach().flatten(1).clone())

    def quantized(self) -> Tensor:
        """The weights, as a matrix."""
        return self.latent

    def clip(self) -> None:
        """What follows every step; float weights have no bounds."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized().view(self.shape)
        return conv2d(x, weight, None, self.stride, self.padding)


class BinaryConv2d(LatentConv2d):
    """``alpha * sign(u)``, alpha the mean of ``|u|`` per output channel (XNOR-Net)."""

    def quantized(self) -> Tensor:
        sign = torch.where(self.latent < 0, -1.0, 1.0)
        alpha = self.latent.abs().mean(1, keepdim=True)
        return alpha * replace(self.latent, sign, torch.ones_like(sign))

    @torch.no_grad()
    def clip(self) -> None:
        """Keep the latents in [-1, 1]."""
        self.latent.clamp_(-1, 1)


class TernaryConv2d(LatentConv2d):
    """``W_p``, 0 or ``-W_n`` by the zone of the latent; both scales are trained too (TTQ)."""

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.latent.div_(self.latent.abs().max().clamp_min(1e-12))  # as the TTQ paper does
        size, (above, below) = self.latent.abs(), self.zones()
        self.scale_pos = nn.Parameter((size * above).sum() / above.sum().clamp_min(1))
        self.scale_neg = nn.Parameter((size * below).sum() / below.sum().clamp_min(1))
        self.clip()

    def zones(self) -> tuple[Tensor, Tensor]:
        """Which latents are above the threshold, and which below minus the threshold."""
        latent = self.latent.detach()
        threshold = 0.7 * latent.abs().mean()  # as TernaryDFW; 0.05 of the largest did worse
        return latent > threshold, latent < -threshold

    def quantized(self) -> Tensor:
        above, below = self.zones()
        # The gradient of a scale is the sum over its zone, thousands of weights: with it SGD grows
        # the scales at any lr at which the latents move. We take the mean. Adam does not mind.
        pos = replace(self.scale_pos, self.scale_pos, 1 / above.sum().clamp_min(1))
        neg = replace(self.scale_neg, self.scale_neg, 1 / below.sum().clamp_min(1))
        level = torch.where(above, pos, torch.where(below, -neg, 0.0))
        slope = torch.where(above, pos, torch.where(below, neg, (pos + neg) / 2)).detach()
        return level + replace(self.latent, torch.zeros_like(slope), slope)

    @torch.no_grad()
    def clip(self) -> None:
        """Clip the latents, and keep the scales positive: else two levels would share a sign."""
        self.latent.clamp_(-1, 1)
        self.scale_pos.clamp_(min=1e-3)
        self.scale_neg.clamp_(min=1e-3)


KINDS = {"float": LatentConv2d, "ternary": TernaryConv2d}
KINDS |= dict.fromkeys(("binary", "xnor"), BinaryConv2d)


def convert(model: nn.Module, net: str) -> None:
    """Replace every convolution inside ``model`` by one of the ``net`` with the same weights."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d:
                setattr(parent, name, KINDS[net](child))


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the same network in plain layers: quantized weights, no latents or scales."""
    state: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LatentConv2d):
            for own in module.state_dict(prefix=f"{name}."):
                del state[own]
            state[f"{name}.weight"] = module.quantized().view(module.shape)
    return state


def replace(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """The number ``value``, with ``slope`` for its derivative by ``x``."""
    return value.detach() + slope * (x - x.detach())

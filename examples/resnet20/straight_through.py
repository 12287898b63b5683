"""The baselines for Adam and SGD: layers that hold latent weights and quantize them on the way.

This is the usual way to train binary and ternary networks, and what a DFW optimizer makes
unnecessary. Gradients pass through the quantizers by the true chain rule where there is one and by
the straight-through estimate elsewhere.
"""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

BOUND = 1.0
THRESHOLD = 0.05
SCALE_MIN = 1e-3


class StraightThroughConv2d(nn.Conv2d):
    """A convolution whose ``weight`` is a latent, quantized in every forward pass."""

    @classmethod
    def replacing(cls, conv: nn.Conv2d) -> Self:
        """A layer that starts from the weights of ``conv``."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            cast(tuple[int, int], conv.kernel_size),
            cast(tuple[int, int], conv.stride),
            cast(tuple[int, int], conv.padding),
            bias=False,
            device="meta",
        )
        layer.weight = conv.weight
        layer.start()
        return layer

    def start(self) -> None:
        """Prepare the latents; nothing to do unless a subclass says so."""

    def quantized(self) -> Tensor:
        """The weights that the network computes with."""
        raise NotImplementedError

    @torch.no_grad()
    def clip(self) -> None:
        """Put the latents back into [-1, 1], after every step.

        The straight-through estimate is 0 beyond the bound: a latent left there would get no
        gradient and never return.
        """
        self.weight.clamp_(-BOUND, BOUND)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.quantized(), None, self.stride, self.padding)


class BinaryConv2d(StraightThroughConv2d):
    """``alpha * sign(w)``, alpha the mean of ``|w|`` per output channel (XNOR-Net)."""

    def quantized(self) -> Tensor:
        quantized: Tensor = _Binarize.apply(self.weight)  # type: ignore[no-untyped-call]
        return quantized


class TernaryConv2d(StraightThroughConv2d):
    """``W_p``, 0 or ``-W_n`` by the zone of the latent; both scales are trained too (TTQ)."""

    scale_pos: nn.Parameter
    scale_neg: nn.Parameter

    @torch.no_grad()
    def start(self) -> None:
        """Divide the latents by the largest, as the TTQ paper does, and set the scales.

        They start where `TernaryDFW` starts its own: at the mean of ``|w|`` beyond the threshold.
        """
        latent = self.weight
        latent /= latent.abs().max().clamp_min(torch.finfo(latent.dtype).tiny)
        zone = ternary_zone(latent)
        self.scale_pos = nn.Parameter(_mean_in(latent.abs(), zone > 0))
        self.scale_neg = nn.Parameter(_mean_in(latent.abs(), zone < 0))

    def quantized(self) -> Tensor:
        quantized: Tensor = _Ternarize.apply(  # type: ignore[no-untyped-call]
            self.weight, self.scale_pos, self.scale_neg
        )
        return quantized

    @torch.no_grad()
    def clip(self) -> None:
        """Clip the latents, and keep the scales positive: else two levels would share a sign."""
        super().clip()
        self.scale_pos.clamp_(min=SCALE_MIN)
        self.scale_neg.clamp_(min=SCALE_MIN)


def convert(model: nn.Module, kind: type[StraightThroughConv2d]) -> None:
    """Replace every plain convolution inside ``model`` by one of ``kind`` with the same weights."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d:
                setattr(parent, name, kind.replacing(child))


def layers(model: nn.Module) -> list[StraightThroughConv2d]:
    """The straight-through layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, StraightThroughConv2d)]


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the same network in plain layers: quantized weights, no latents or scales."""
    state: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, StraightThroughConv2d):
            for own in module.state_dict(prefix=f"{name}."):
                del state[own]
            state[f"{name}.weight"] = module.quantized()
    return state


def ternary_zone(latent: Tensor) -> Tensor:
    """1 above the threshold, -1 below minus the threshold, else 0."""
    threshold = THRESHOLD * latent.abs().max()
    return (latent > threshold).to(torch.int8) - (latent < -threshold).to(torch.int8)


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        sign = torch.where(latent < 0, -1.0, 1.0).to(latent.dtype)
        alpha = latent.abs().mean((1, 2, 3), keepdim=True)
        ctx.save_for_backward(sign, alpha)
        return alpha * sign

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        sign, alpha = ctx.saved_tensors
        # Through the sign: the identity, since clipping keeps all latents in [-1, 1]. Through
        # alpha: the derivative of the mean of |w|.
        through_alpha = (gradient * sign).mean((1, 2, 3), keepdim=True)
        return cast(Tensor, alpha * gradient + sign * through_alpha)


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale_pos: Tensor, scale_neg: Tensor) -> Tensor:
        zone = ternary_zone(latent)
        ctx.save_for_backward(zone, scale_pos, scale_neg)
        return torch.where(zone > 0, scale_pos, torch.where(zone < 0, -scale_neg, 0.0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        zone, scale_pos, scale_neg = ctx.saved_tensors
        factor = torch.where(zone > 0, scale_pos, torch.where(zone < 0, scale_neg, 1.0))
        above, below = zone > 0, zone < 0
        # A weight below the threshold is -W_n, so the gradient of W_n has a minus. The TTQ paper
        # leaves it out, which would climb in W_n while descending in everything else.
        #
        # The paper also sums over the zone, where we take the mean. The sum, over thousands of
        # weights, makes SGD grow the scales at any lr at which the latents move, and from random
        # weights it hardly learns; the paper starts from a trained float net. Adam does not mind.
        return (
            gradient * factor,
            (gradient * above).sum() / above.sum().clamp_min(1),
            -(gradient * below).sum() / below.sum().clamp_min(1),
        )


def _mean_in(values: Tensor, zone: Tensor) -> Tensor:
    # An empty zone has no mean; 1 is what the paper's code starts from.
    mean = values[zone].mean() if bool(zone.any()) else values.new_tensor(1.0)
    return mean.clamp_min(SCALE_MIN)

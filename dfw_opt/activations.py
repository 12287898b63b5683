"""The sign activation of binary networks, with a straight-through gradient."""

import math
from typing import Any

import torch
from torch import Tensor, nn


class SignActivation(nn.Module):
    r"""Binary activations :math:`\operatorname{sign}(x)`, with :math:`\operatorname{sign}(0) = +1`.

    The derivative is 0 almost everywhere; the backward pass puts an estimate in its place. In an
    XNOR block it has no ReLU beside it: BatchNorm → sign → binary convolution → pool.

    Args:
        ste: ``"clipped"``, :math:`\mathbb 1[|x| \le 1]`, the derivative of hard tanh; or
            ``"approx"``, :math:`\max(0,\ 2 - 2|x|)`, of a piecewise quadratic close to the sign.

    Shape:
        any, floating point; output of the same shape and dtype. NaN maps to -1 or +1.

    Raises:
        ValueError: ``ste`` is neither of the two.

    >>> SignActivation()(torch.tensor([-0.3, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])

    Source: Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279) for ``"clipped"``;
    Liu et al., *Bi-Real Net*, ECCV 2018 (arXiv 1808.00278) for ``"approx"``.
    """

    def __init__(self, ste: str = "clipped") -> None:
        super().__init__()
        if ste not in ("approx", "clipped"):
            raise ValueError(f"ste={ste!r} must be one of ['approx', 'clipped']")
        self.ste = ste

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript has no room for a gradient of our own; what is traced is for use.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        y: Tensor = (_Sign.forward if traced else _Sign.apply)(x, self.ste)
        return y


class _Sign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, ste: str) -> Tensor:
        if torch.compiler.is_compiling():  # ONNX has no copysign, and a compiler fuses this one
            return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        # Adding 0 makes -0 positive. torch.where would take thirty times as long on bfloat16.
        return torch.copysign(x.new_ones(()), x + 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        x, ctx.ste = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.ste == "approx":
            return grad * (2 - 2 * x.abs()).clamp_(min=0), None
        # One fused pass. It is strict at its bounds, so they lie one float beyond 1.
        bound = math.nextafter(1, 2) if x.dtype == torch.float64 else 1 + 2**-23
        return torch.ops.aten.hardtanh_backward(grad, x, -bound, bound), None

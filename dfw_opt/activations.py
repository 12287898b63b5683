"""The sign activation of binary networks, with a straight-through gradient."""

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SignActivation"]


class SignActivation(nn.Module):
    r"""Binary activations :math:`\operatorname{sign}(x)`, with :math:`\operatorname{sign}(0) = +1`.

    The derivative is 0 almost everywhere; the backward pass puts an estimate in its place:

    - ``"clipped"``: :math:`\mathbb 1[|x| \le 1]`, that of hard tanh;
    - ``"approx"``: :math:`\max(0,\ 2 - 2|x|)`, that of a piecewise quadratic close to the sign.

    In an XNOR block it stands between BatchNorm and the binary convolution, with no ReLU:
    BatchNorm → sign → convolution → pool.

    Args:
        ste: ``"clipped"`` or ``"approx"``.

    Shape:
        any, floating point; the output has the shape and dtype of the input. NaN maps to -1 or
        +1, by its sign bit.

    Raises:
        ValueError: ``ste`` is neither of the two.

    >>> SignActivation()(torch.tensor([-0.3, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])

    Source: Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279) for ``"clipped"``;
    Liu et al., *Bi-Real Net*, ECCV 2018 (arXiv 1808.00278) for ``"approx"``.
    """

    def __init__(self, ste: str = "clipped") -> None:
        super().__init__()
        if ste not in _ESTIMATES:
            raise ValueError(f"ste={ste!r} must be one of {sorted(_ESTIMATES)}")
        self.ste = ste

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript has no room for a gradient of our own; what is traced is for use.
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return sign(x)
        y: Tensor = _ESTIMATES[self.ste].apply(x)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"ste={self.ste!r}"


def sign(x: Tensor) -> Tensor:
    r""":math:`\operatorname{sign}(x)` with :math:`\operatorname{sign}(\pm 0) = +1`, in the dtype of
    ``x``; NaN gives -1 or +1.
    """
    if torch.compiler.is_compiling():  # ONNX has no copysign, and a compiler fuses this one
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    # Adding 0 makes -0 positive. copysign stays in the dtype of x: torch.where on two numbers takes
    # thirty times as long on bfloat16.
    return torch.copysign(x.new_ones(()), x + 0.0)


class _Sign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _Clipped(_Sign):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # One fused pass. It is strict at its bounds, so they lie one float beyond 1.
        bound = math.nextafter(1, 2) if x.dtype == torch.float64 else 1 + 2**-23
        x_grad: Tensor = torch.ops.aten.hardtanh_backward(grad, x, -bound, bound)
        return x_grad


class _Approx(_Sign):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = (2 - 2 * x.abs()).clamp_(min=0)
        return grad * slope


_ESTIMATES: dict[str, type[_Sign]] = {"clipped": _Clipped, "approx": _Approx}

"""The sign that binary networks need: never 0."""

import torch
from torch import Tensor

__all__ = ["sign"]


def sign(x: Tensor) -> Tensor:
    r""":math:`\operatorname{sign}(x)` with :math:`\operatorname{sign}(\pm 0) = +1`, in the dtype of
    ``x``; NaN gives -1 or +1.
    """
    if torch.compiler.is_compiling():  # ONNX has no copysign, and a compiler fuses this one
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    # Adding 0 makes -0 positive. copysign stays in the dtype of x: torch.where on two numbers takes
    # thirty times as long on bfloat16.
    return torch.copysign(x.new_ones(()), x + 0.0)

"""The first Deep Frank-Wolfe, as a yardstick."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class OriginalDFW(Optimizer):
    """Algorithm 1 of Berrada et al. (ICLR 2019) as it was first programmed, written anew.

    Python loops over the parameters, one torch operation at a time; the gradient of the regulariser
    is made first and kept to the end, and γ is read as a number, for which an accelerator is waited
    for. It computes what :class:`dfw_opt.DFW` does.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.eps, self.gamma = eps, 0.0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None, *, loss: Tensor) -> None:  # type: ignore[override]
        """One step, from the loss whose gradients are in place."""
        decays = {p: weight_decay * p for p, _, _, weight_decay in self._each()}

        numerator: Any = float(loss)
        denominator: Any = 0.0
        for p, lr, _, _ in self._each():
            numerator -= lr * torch.sum(p.grad * decays[p])
            denominator += lr * p.grad.norm() ** 2
        self.gamma = float((numerator / (denominator + self.eps)).clamp(0, 1))

        for p, lr, momentum, _ in self._each():
            d, r, z = p.grad, decays[p], self.state[p]["momentum_buffer"]
            p -= lr * (r + self.gamma * d)
            if momentum:
                z *= momentum
                z -= lr * self.gamma * (d + r)
                p += momentum * z

    def _each(self) -> list[tuple[Any, float, float, float]]:
        return [
            (p, group["lr"], group["momentum"], group["weight_decay"])
            for group in self.param_groups
            for p in group["params"]
        ]

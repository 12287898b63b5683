r"""What a step trains: float parameters, latents and scales, all moved by one formula.

.. math::

    z \leftarrow \mu z - \eta\gamma\,(D + \lambda v), \qquad
    v \leftarrow \Pi\bigl(v - \eta\,(\lambda v + \gamma D) + \mu z\bigr).

In the spectral norm momentum is in the plane, and there is no :math:`z`.

Source: Berrada et al., ICLR 2019 (arXiv 1811.07591), Algorithm 1 and appendix on Nesterov momentum.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Stack", "Variable", "stack"]

Stack = Callable[[Sequence[Tensor]], Tensor]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension; a single one in the memory that it has."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


@dataclass(eq=False)
class Variable:
    r"""Tensors that are trained alike, in batches of one shape.

    Attributes:
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        momentum: :math:`\mu`.
        lower: the least value.
        upper: the largest.
        searched: whether the step size sees the bounds.
        values: :math:`v`, moved in place: a list for each batch.
        directions: :math:`D`, shape ``(batch, *shape)``, float32 or wider. A move uses them up.
        planes: :math:`m`, a list for each batch; ``None`` where it is :math:`M D`.
        metrics: :math:`M`, the squared change that a unit step makes in the weights, one number a
            tensor; ``None`` is 1.
        velocities: :math:`z`, for each value; none where momentum is in the plane, or 0.
    """

    lr: float | Tensor
    weight_decay: float
    momentum: float
    lower: float
    upper: float
    searched: bool
    stack: Stack = stack
    values: list[list[Tensor]] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)
    planes: list[list[Tensor] | None] = field(default_factory=list)
    metrics: list[Tensor | None] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)

    def dual_terms(self) -> tuple[list[Tensor], list[Tensor]]:
        r""":math:`\eta\langle m, \lambda v\rangle` and :math:`\eta\langle m, D\rangle` of each batch.

        What decay and the full step take from the plane; no terms where there is no decay.
        """
        decay, full = [], []
        for values, D, plane, metric in self._batches():
            m = D if plane is None else self.stack(plane)
            m = m if metric is None else metric * m
            full.append((m * D).sum())
            if self.weight_decay:
                decay.append((m * self.stack(values).to(D.dtype)).sum())
        torch._foreach_mul_(full, self.lr)
        if decay:
            torch._foreach_mul_(decay, self.lr * self.weight_decay)
        return decay, full

    def dual_slope(self, gamma: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        r""":math:`\langle m, v(\gamma) - v\rangle` in the box, and its right derivative."""
        slopes, bends = [], []
        for values, D, _, metric in self._batches():
            v, m = self.stack(values).to(D.dtype), D if metric is None else metric * D
            step = -self.lr * gamma * D
            if self.weight_decay:
                step = step - self.lr * self.weight_decay * v
            # Steps, not places, are compared and summed: v(γ) − v would lose a small step's digits.
            below, above = self.lower - v, self.upper - v
            taken = torch.clamp(step, below, above)
            free = (taken == step) & (step != torch.where(D > 0, below, above))
            slopes.append((m * taken).sum())
            bends.append(-self.lr * (m * D * free).sum())
        return slopes, bends

    def update_(self, gamma: Tensor, counts: Tensor) -> None:
        """The module's formulas, in place; where ``counts`` is 0 rather than 1, nothing changes."""
        torch._foreach_mul_(self.directions, -self.lr * gamma)
        steps = [step for D in self.directions for step in D.unbind()]
        values, z = [v for batch in self.values for v in batch], self.velocities
        decay = self.lr * self.weight_decay * counts if self.weight_decay else None
        if z:
            torch._foreach_mul_(z, 1 - (1 - self.momentum) * counts)
            torch._foreach_add_(z, steps)
            if decay is not None:
                torch._foreach_sub_(z, torch._foreach_mul(values, decay * gamma))
        if decay is not None:
            torch._foreach_sub_(steps, torch._foreach_mul(values, decay))
        if z:
            torch._foreach_add_(steps, torch._foreach_mul(z, self.momentum * counts))
        # One addition, so that in half precision what is small is not rounded away on its own.
        torch._foreach_add_(values, steps)
        if self.lower > -math.inf:
            torch._foreach_clamp_min_(values, self.lower)
        if self.upper < math.inf:
            torch._foreach_clamp_max_(values, self.upper)

    def _batches(self):  # type: ignore[no-untyped-def]
        return zip(self.values, self.directions, self.planes, self.metrics, strict=True)

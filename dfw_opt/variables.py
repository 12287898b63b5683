r"""What a step trains: float parameters, latents and scales, all moved by one formula.

.. math::

    z \leftarrow \mu z - \eta\gamma\,(D + \lambda v), \qquad
    v \leftarrow \Pi\bigl(v - \eta\,(\lambda v + \gamma D) + \mu z\bigr).

In the spectral norm momentum is in the plane, and there is no :math:`z`.

Source: Berrada et al., ICLR 2019 (arXiv 1811.07591), Algorithm 1 and appendix on Nesterov momentum.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Stack", "Variable", "add_", "stack", "wide"]

Stack = Callable[[Sequence[Tensor]], Tensor]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension; a single one in the memory that it has."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def wide(x: Tensor) -> Tensor:
    """Float32 or wider: sums and small steps vanish in half precision."""
    return x if x.dtype.itemsize >= 4 else x.float()


def add_(targets: list[Tensor], sources: list[Tensor], factor: float | Tensor) -> None:
    """``targets += factor * sources``, in place."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(sources, factor))
    else:
        torch._foreach_add_(targets, sources, alpha=factor)


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
        values: :math:`v`, moved in place.
        directions: :math:`D`, for each value, float32 or wider.
        planes: :math:`m`, for each value; ``None`` for a batch where it is :math:`M D`.
        metrics: :math:`M` of each batch, the squared change that a unit step makes in the weights,
            shape ``(batch, 1, ...)``; ``None`` is 1.
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
    directions: list[Sequence[Tensor]] = field(default_factory=list)
    planes: list[list[Tensor] | None] = field(default_factory=list)
    metrics: list[Tensor | None] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)

    def add(
        self,
        values: list[Tensor],
        directions: Sequence[Tensor],
        plane: list[Tensor] | None = None,
        *,
        metric: Tensor | None = None,
        velocity: Sequence[Tensor] = (),
    ) -> None:
        """Adds a batch: tensors of one shape."""
        self.values.append(values)
        self.directions.append(directions)
        self.planes.append(plane)
        self.metrics.append(metric)
        self.velocities += velocity

    def dual_terms(self) -> tuple[list[Tensor], list[Tensor]]:
        r""":math:`\eta\langle m, \lambda v\rangle`, if there is decay, and
        :math:`\eta\langle m, D\rangle` of each batch: what they take from the plane.
        """
        decay, full = [], []
        for values, D, m in self._batches():
            full.append(_inner(m, D))
            if self.weight_decay:
                decay.append(_inner(m, self._stacked(values)))
        torch._foreach_mul_(full, self.lr)
        if decay:
            torch._foreach_mul_(decay, self.lr * self.weight_decay)
        return decay, full

    def dual_slope(self, gamma: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        r""":math:`\langle m, v(\gamma) - v\rangle` in the box, and its right derivative."""
        slopes, bends = [], []
        for values, D, m in self._batches():
            v = self._stacked(values)
            step = -self.lr * gamma.to(D) * D
            if self.weight_decay:
                step = step - self.lr * self.weight_decay * v
            # Steps, not places, are compared and summed: v(γ) − v would lose a small step's digits.
            below, above = self.lower - v, self.upper - v
            taken = torch.clamp(step, below, above)
            free = (taken == step) & (step != torch.where(D > 0, below, above))
            slopes.append((m * taken).sum())
            bends.append(-self.lr * (m * D * free).sum())
        return slopes, bends

    def update_(self, gamma: float | Tensor, counts: float | Tensor) -> None:
        """The module's formulas, in place; where ``counts`` is 0 rather than 1, nothing changes."""
        values = [v for batch in self.values for v in batch]
        D, z = [d for batch in self.directions for d in batch], self.velocities
        gamma, counts = (x.to(D[0]) if isinstance(x, Tensor) else x for x in (gamma, counts))
        full, decay = -self.lr * gamma, -self.lr * self.weight_decay * counts
        if z:
            torch._foreach_mul_(z, 1 - (1 - self.momentum) * counts)
            add_(z, D, full)
            if self.weight_decay:
                add_(z, values, decay * gamma)
        # In half precision a small part of a step, rounded on its own, would be lost.
        moved = [wide(v) for v in values]
        if self.weight_decay:
            torch._foreach_mul_(moved, 1 + decay)
        add_(moved, D, full)
        if z:
            add_(moved, z, self.momentum * counts)
        if self.lower > -math.inf:
            torch._foreach_clamp_min_(moved, self.lower)
        if self.upper < math.inf:
            torch._foreach_clamp_max_(moved, self.upper)
        for v, result in zip(values, moved, strict=True):
            if result is not v:
                v.copy_(result)

    def _batches(self) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        """The values of each batch, its :math:`D` and its :math:`m`, stacked."""
        parts = zip(self.values, self.directions, self.planes, self.metrics, strict=True)
        for values, directions, plane, metric in parts:
            D = self.stack(directions)
            m = D if plane is None else self.stack(plane)
            yield values, D, m if metric is None else metric * m

    def _stacked(self, values: list[Tensor]) -> Tensor:
        return wide(self.stack(values))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products. Squares are summed row by row, exactly enough and with no copy."""
    if a is not b:
        return (a * b).sum()
    rows = a.flatten(2) if a.dim() > 2 else a.unsqueeze(-1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.square().sum()

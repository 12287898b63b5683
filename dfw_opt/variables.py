r"""What a step trains: float parameters, latents and scales, all moved by one formula.

.. math::

    z \leftarrow \mu z - \eta\gamma\,(D + \lambda v), \qquad
    v \leftarrow \Pi\bigl(v - \eta\,(\lambda v + \gamma D) + \mu z\bigr).

In the spectral norm momentum is in the plane, and there is no :math:`z`.

Source: Berrada et al., ICLR 2019 (arXiv 1811.07591), Algorithm 1 and appendix on Nesterov momentum.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = Tensor | list[Tensor]
"""Tensors of one shape, as a sequence or stacked along a first dimension."""


def stack(batch: Batch) -> Tensor:
    """A batch along a first dimension; a single tensor in the memory that it has."""
    if isinstance(batch, Tensor):
        return batch
    return torch.stack([*batch]) if len(batch) > 1 else batch[0].unsqueeze(0)


def wide(x: Tensor) -> Tensor:
    """Float32 or wider: sums and small steps vanish in half precision."""
    return x if x.dtype.itemsize >= 4 else x.float()


def squares(batch: Sequence[Tensor]) -> Tensor:
    """The sum of all squares, 0-dim. Not of many at once: float32 would lose their last digits."""
    few = 2**18
    parts = [y for x in batch for y in (torch.split(x.flatten(), few) if x.numel() > few else [x])]
    return torch.stack([*torch._foreach_norm(parts)]).square().sum()


def add_(targets: list[Tensor], sources: list[Tensor], factor: float | Tensor) -> None:
    """``targets += factor * sources``, in place."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(sources, factor))
    else:
        torch._foreach_add_(targets, sources, alpha=factor)


@dataclass(eq=False)
class Variable:
    r"""Tensors of one shape that are trained alike.

    Attributes:
        values, directions, planes: :math:`v`, :math:`D`, :math:`m`; the last two at least float32.
        lr, weight_decay, momentum: :math:`\eta`, :math:`\lambda`, and :math:`\mu` of :math:`z`.
        lower, upper: the bounds of the values.
        velocities: :math:`z`; none where momentum is in the plane, or 0.
        alike: what variables have in common that are moved at once.
        searched: whether the step size sees the bounds.
        product: :math:`\langle m, D\rangle`, 0-dim, where that is known.
        states, prefix, layout: where more is kept of each, by which names; how it is to be read.
    """

    values: list[Tensor]
    directions: Batch
    planes: Batch
    lr: float | Tensor
    weight_decay: float = 0.0
    lower: float = -math.inf
    upper: float = math.inf
    momentum: float = 0.0
    velocities: list[Tensor] | tuple[()] = ()
    alike: Any = None
    searched: bool = False
    product: Tensor | None = None
    states: list[dict[str, Tensor]] | tuple[()] = ()
    prefix: str = ""
    layout: str = "matrix"

    def dual_terms(self) -> tuple[Tensor | None, Tensor]:
        r""":math:`\eta\langle m, \lambda v\rangle`, if any, and :math:`\eta\langle m, D\rangle`."""
        decay, product = None, self.product
        if product is None:
            product = (stack(self.planes) * stack(self.directions)).sum()
        if self.weight_decay:
            inner = (stack(self.planes) * wide(stack(self.values))).sum()
            decay = self.lr * self.weight_decay * inner
        return decay, self.lr * product

    def dual_slope(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\langle m, v(\gamma) - v\rangle` in the box, and its right derivative, 0-dim."""
        v, D, m = wide(stack(self.values)), stack(self.directions), stack(self.planes)
        step = -self.lr * gamma.to(D) * D
        if self.weight_decay:
            step = step - self.lr * self.weight_decay * v
        # Steps, not places, are compared and summed: v(γ) − v would lose a small step's digits.
        below, above = self.lower - v, self.upper - v
        taken = torch.clamp(step, below, above)
        free = (taken == step) & (step != torch.where(D > 0, below, above))
        return (m * taken).sum(), -self.lr * (m * D * free).sum()


def update_(variables: Iterable[Variable], gamma: float | Tensor, counts: float | Tensor) -> None:
    """The module's formulas, in place; where ``counts`` is 0 rather than 1, nothing changes."""
    alike: dict[Any, list[Variable]] = {}
    for variable in variables:
        alike.setdefault(variable.alike, []).append(variable)
    for same in alike.values():
        values = [x for v in same for x in v.values]
        D, z = [x for v in same for x in v.directions], [x for v in same for x in v.velocities]
        lr, decay, mu = same[0].lr, same[0].weight_decay, same[0].momentum
        share, count = (x.to(D[0]) if isinstance(x, Tensor) else x for x in (gamma, counts))
        full = -lr * share
        if isinstance(full, Tensor):
            D, full = [*torch._foreach_mul(D, full)], 1.0
        if z:
            torch._foreach_mul_(z, 1 - (1 - mu) * count)
            torch._foreach_add_(z, D, alpha=full)
            if decay:
                add_(z, values, -lr * decay * share)
        # In half precision a small part of a step, rounded on its own, would be lost.
        moved = [wide(v) for v in values]
        if decay:
            torch._foreach_mul_(moved, 1 - lr * decay * count)
        torch._foreach_add_(moved, D, alpha=full)
        if z:
            add_(moved, z, mu * count)
        if same[0].lower > -math.inf:
            torch._foreach_clamp_min_(moved, same[0].lower)
        if same[0].upper < math.inf:
            torch._foreach_clamp_max_(moved, same[0].upper)
        for v, result in zip(values, moved, strict=True):
            if result is not v:
                v.copy_(result)

r"""Variables, and what a step does with them: its sums for :math:`\gamma`, then its move.

Everything that a step trains, be it a float parameter, a latent or a scale, is a
:class:`Variables` entry: a value :math:`v`, its gradient :math:`d = M^{-1}\delta` in the metric
:math:`M`, and bounds. With :math:`\eta` the learning rate, :math:`\lambda` the weight decay
(:math:`\rho = \frac\lambda2\|v\|_M^2`, so that its gradient is :math:`\lambda v` in every metric)
and :math:`\mu` the momentum, a step is

.. math::

    z \leftarrow \mu z - \eta\gamma\,(d + \lambda v), \qquad
    v \leftarrow \Pi\bigl(v - \eta\,(\lambda v + \gamma d) + \mu z\bigr).

``single_*`` functions are these formulas, one tensor at a time; ``multi_*`` functions compute the
same with torch's ``_foreach`` kernels.

Source: Berrada et al., ICLR 2019 (arXiv 1811.07591), Algorithm 1 and appendix on Nesterov momentum.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dfw_opt.quantizers import Pulled
from dfw_opt.sharding import Groups
from dfw_opt.step_size import box_slope

__all__ = ["UNBOUNDED", "Bounds", "Variables", "wide"]

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-float("inf"), float("inf"))


@dataclass(eq=False)
class Variables:
    """Tensors of one device and dtype that share hyper-parameters and bounds."""

    lr: float | Tensor
    weight_decay: float
    momentum: float | None
    """``None`` where no buffer is kept."""
    bounds: Bounds
    exact: bool
    """Whether the search for the step size sees the bounds."""
    foreach: bool
    groups: Groups = ()
    """Where the tensors are parts of sharded ones: over which processes sums have to be added."""
    values: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    metrics: list[Tensor | None] = field(default_factory=list)
    """``None`` stands for 1; either all of a batch are ``None``, or none."""
    owners: list[tuple[Tensor, str]] = field(default_factory=list)
    """The parameter that each value is or is the state of, and its key there, or ""."""
    buffers: list[Tensor] = field(default_factory=list)
    """Momentum :math:`z`, one a value; empty where none is kept."""

    def add(self, value: Tensor, pulled: Pulled, owner: tuple[Tensor, str]) -> None:
        self.values.append(value)
        self.gradients.append(pulled.gradient)
        self.metrics.append(pulled.metric)
        self.owners.append(owner)

    @property
    def searched(self) -> bool:
        """Whether the bounds take part in the search for the step size."""
        return self.exact and self.bounds != UNBOUNDED

    def stacked_metrics(self) -> Tensor | float:
        metrics = [M for M in self.metrics if M is not None]
        return torch.stack(metrics) if metrics else 1.0

    def sums(self) -> tuple[Tensor, Tensor]:
        r"""The sums :math:`\sum\eta\langle d, \lambda v\rangle_M` and :math:`\sum\eta\|d\|_M^2`."""
        return multi_sums(self) if self.foreach else single_sums(self)

    def slope(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        r"""What these variables add to :math:`\varphi'(\gamma)` and to its right derivative."""
        return slope_in_box(self, gamma)

    def move(self, gamma: Tensor, finite: Tensor | None = None) -> None:
        """Moves values and buffers by the module's formulas, in place.

        Where ``finite`` is false all stay as they are; ``None`` says that it is known to be true.
        """
        (multi_move if self.foreach else single_move)(self, gamma, finite)

    def inside(self) -> bool:
        """Whether all values, and what decay makes of them, are within the bounds; reads them."""
        lower, upper = self.bounds
        if self.lr * self.weight_decay > 1:
            return False
        extremes = [end for v in self.values if v.numel() for end in v.aminmax()]
        return all(lower <= end <= upper for end in extremes)


def single_sums(group: Variables) -> tuple[Tensor, Tensor]:
    """:meth:`Variables.sums`, one tensor at a time."""
    device, dtype = group.values[0].device, wide(group.values[0].dtype)
    decay = curvature = torch.zeros((), device=device, dtype=dtype)
    for v, d, M in zip(group.values, group.gradients, group.metrics, strict=True):
        m = 1 if M is None else M
        curvature = curvature + m * torch.linalg.vector_norm(d, dtype=dtype).square()
        if group.weight_decay:
            decay = decay + m * (d.to(dtype) * v.to(dtype)).sum()
    return group.lr * group.weight_decay * decay, group.lr * curvature


def multi_sums(group: Variables) -> tuple[Tensor, Tensor]:
    """:meth:`Variables.sums` by multi-tensor kernels."""
    values, gradients = group.values, group.gradients
    dtype = wide(gradients[0].dtype)
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype)).square()
    metrics = group.stacked_metrics()
    curvature = group.lr * (squares * metrics).sum()
    if not group.weight_decay:
        return torch.zeros_like(curvature), curvature
    if gradients[0].dtype != dtype:
        values = [v.to(dtype) for v in values]
        gradients = [d.to(dtype) for d in gradients]
    products = torch._foreach_mul(gradients, values)
    inner = torch.stack([product.sum() for product in products])
    return group.lr * group.weight_decay * (inner * metrics).sum(), curvature


def slope_in_box(group: Variables, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`Variables.slope`, one tensor at a time."""
    slope = bend = torch.zeros_like(gamma)
    for v, d, M in zip(group.values, group.gradients, group.metrics, strict=True):
        dtype = wide(d.dtype)
        s, b = box_slope(
            gamma,
            v.to(dtype),
            d.to(dtype),
            lr=group.lr,
            weight_decay=group.weight_decay,
            lower=group.bounds[0],
            upper=group.bounds[1],
        )
        m = 1 if M is None else M
        slope, bend = slope + m * s, bend + m * b
    return slope, bend


def single_move(group: Variables, gamma: Tensor, finite: Tensor | None) -> None:
    """:meth:`Variables.move`, one tensor at a time."""
    lr, weight_decay, momentum = group.lr, group.weight_decay, group.momentum
    for i, (v, d) in enumerate(zip(group.values, group.gradients, strict=True)):
        r = weight_decay * v
        moved = v - lr * (r + gamma * d)
        if momentum is not None:
            z = momentum * group.buffers[i] - lr * gamma * (d + r)
            moved = moved + momentum * z
            _assign(group.buffers[i], z, finite)
        _assign(v, moved.clamp(*group.bounds), finite)


def _assign(target: Tensor, value: Tensor, finite: Tensor | None) -> None:
    target.copy_(value if finite is None else torch.where(finite, value, target))


def multi_move(group: Variables, gamma: Tensor, finite: Tensor | None) -> None:
    """:meth:`Variables.move` by multi-tensor kernels."""
    values, buffers = group.values, group.buffers
    decay: float | Tensor = group.lr * group.weight_decay
    kept: float | Tensor = group.momentum or 0.0
    ahead = kept
    if finite is None:
        steps = torch._foreach_mul(group.gradients, group.lr * gamma)
    else:
        # A step that does not count has length 0, no decay, and keeps the whole momentum.
        gamma, counts = gamma.where(finite, 0), finite.to(gamma.dtype)
        decay, ahead = counts * decay, counts * ahead
        kept = ahead.where(finite, 1)
        steps = torch._foreach_mul(group.gradients, group.lr * gamma)
        _clear_unless(finite, steps)
    if group.momentum is not None:
        torch._foreach_mul_(buffers, kept)
        torch._foreach_sub_(buffers, steps)
        if group.weight_decay:
            decays = torch._foreach_mul(values, gamma * decay)
            _clear_unless(finite, decays)
            torch._foreach_sub_(buffers, decays)
    if group.weight_decay:
        torch._foreach_mul_(values, 1 - decay)
    torch._foreach_sub_(values, steps)
    if group.momentum is not None:
        _add_scaled(values, buffers, ahead)
    if group.bounds != UNBOUNDED:
        _clamp(values, group.bounds, finite)


def _clear_unless(finite: Tensor | None, tensors: Iterable[Tensor]) -> None:
    """Sets to 0 what was multiplied by 0, which infinity survives."""
    if finite is not None:
        not_finite = ~finite
        for tensor in tensors:
            tensor.masked_fill_(not_finite, 0)


def _clamp(values: list[Tensor], bounds: Bounds, finite: Tensor | None) -> None:
    if finite is None:
        torch._foreach_clamp_min_(values, bounds[0])
        torch._foreach_clamp_max_(values, bounds[1])
        return
    like = values[0].new_zeros(())
    lower, upper = (
        (like + bound).where(finite, none) for bound, none in zip(bounds, UNBOUNDED, strict=True)
    )
    for value in values:
        value.clamp_(lower, upper)


def _add_scaled(values: list[Tensor], others: list[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):  # which _foreach_add_ does not take
        for value, other in zip(values, others, strict=True):
            value.addcmul_(other, factor.to(value))
    else:
        torch._foreach_add_(values, others, alpha=factor)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums: products of half-precision gradients overflow or vanish in their own."""
    return torch.promote_types(dtype, torch.float32)

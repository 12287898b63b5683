r"""The step size: how far to go towards the linearised loss.

At weights :math:`w_t` with mini-batch loss :math:`\ell`, its gradient :math:`\delta` and that of
the regulariser, :math:`r`, Deep Frank-Wolfe moves to

.. math::

    w(\gamma) = \Pi_C\bigl(w_t - \eta\,(r + \gamma\,\delta)\bigr), \qquad \gamma \in [0, 1],

where :math:`C` is the constraint set (all of space, or a box) and :math:`\gamma` is the dual
variable of the hinge :math:`\max(0, \text{linearised loss})`. It maximises a concave function
:math:`\varphi`, with

.. math::

    \varphi'(\gamma) = \ell + \langle \delta,\, w(\gamma) - w_t\rangle - \varepsilon\gamma .

The last term makes :math:`\varphi` strictly concave; :math:`\varepsilon` is small. Without a box
:math:`\varphi'` is a straight line and its root has a closed form (:func:`closed_form`). With a
box it is piecewise linear, and :func:`maximize` finds the root by Newton's method, each
evaluation one pass over the constrained weights (:func:`box_slope`). Clipping the closed form
into the box afterwards is *not* the same: it ignores that blocked weights stop contributing to
the decrease.

All functions are pure, take and return tensors, and never read a value back from an accelerator.

Source: Berrada, Zisserman, Pawan Kumar, *Deep Frank-Wolfe for Neural Network Optimization*, ICLR
2019 (arXiv 1811.07591), Section 3 and Algorithm 1 for the closed form; the box search is ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "FIXED_EVALUATIONS",
    "MAX_EVALUATIONS",
    "box_slope",
    "climb",
    "closed_form",
    "maximize",
    "readable",
]

MAX_EVALUATIONS = 100
"""How often :func:`maximize` evaluates the slope at most; a handful is usual."""

# How many steps climb takes before it leaves the rest to maximize.
_CLIMB = 10

FIXED_EVALUATIONS = 20
"""How often :func:`maximize` evaluates the slope on an accelerator, where stopping early would mean
to wait for a result."""


def closed_form(loss: Tensor, decay: Tensor, curvature: Tensor, eps: float) -> Tensor:
    r"""The maximiser of the unconstrained dual,

    .. math::

        \gamma = \operatorname{clip}_{[0,1]}
            \frac{\ell - \sum \eta\langle\delta, r\rangle}{\sum \eta\|\delta\|^2 + \varepsilon} .

    Args:
        loss: :math:`\ell`, 0-dim.
        decay: :math:`\sum \eta\langle\delta, r\rangle` over all parameters, 0-dim.
        curvature: :math:`\sum \eta\|\delta\|^2` over all parameters, 0-dim.
        eps: :math:`\varepsilon \ge 0`.

    Returns:
        :math:`\gamma`, 0-dim; 1 where numerator and denominator are both 0.
    """
    slope_at_0 = loss - decay
    slope_at_1 = slope_at_0 - (curvature + eps)
    root = slope_at_0 / (curvature + eps)
    # The end points are decided by the slopes, so that 0/0 and x/0 are never looked at.
    return torch.where(slope_at_1 >= 0, 1.0, torch.where(slope_at_0 <= 0, 0.0, root)).to(root.dtype)


def box_slope(
    gamma: Tensor,
    value: Tensor,
    gradient: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    lower: float,
    upper: float,
) -> tuple[Tensor, Tensor]:
    r"""What one tensor in a box adds to :math:`\varphi'(\gamma)`, and to its right derivative:

    .. math::

        \langle d,\, w(\gamma) - w\rangle, \qquad -\eta \sum_{i\ \text{free}} d_i^2, \qquad
        w(\gamma) = \operatorname{clip}_{[\text{lower}, \text{upper}]}
            \bigl(w - \eta(\lambda w + \gamma d)\bigr).

    A weight is free where a slightly larger :math:`\gamma` still moves it.

    Args:
        gamma: :math:`\gamma`, 0-dim.
        value: :math:`w`, any shape.
        gradient: :math:`d`, the shape of ``value``.
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`.
        lower: lower bound, may be ``-inf``.
        upper: upper bound, may be ``inf``.

    Returns:
        Two 0-dim tensors. The first is non-increasing in :math:`\gamma`; the second is not
        positive.
    """
    d = gradient
    # Steps, not places, are compared and summed: w(gamma) - w would lose a small step's digits.
    step = -lr * (weight_decay * value + gamma * d)
    room_below, room_above = lower - value, upper - value
    taken = step.clamp(room_below, room_above)
    held = (taken != step) | torch.where(d > 0, step == room_below, step == room_above)
    return (d * taken).sum(), -lr * d.masked_fill(held, 0).square().sum()


def maximize(
    slope: Callable[[Tensor], tuple[Tensor, Tensor]],
    max_evaluations: int = MAX_EVALUATIONS,
    *,
    like: Tensor | None = None,
) -> Tensor:
    r"""Where on :math:`[0, 1]` a concave, piecewise quadratic :math:`\varphi` is largest.

    Newton's method on :math:`\varphi'`, inside a bracket :math:`[a, b]` with
    :math:`\varphi'(a) > 0 > \varphi'(b)`. Where every weight starts inside its box
    :math:`\varphi'` is convex, no step from :math:`a` overshoots, and the root is reached exactly
    once its linear piece is; elsewhere the secant takes part. The area
    :math:`\varphi'(a)\,(b - a)` bounds :math:`\max\varphi - \varphi(a)`; whenever a step does not
    halve it, the next evaluation bisects, which does. So after :math:`K` evaluations
    :math:`\varphi(a)` is within :math:`2^{-\lfloor (K-2)/2 \rfloor}\,\varphi'(0)` of the maximum,
    whatever the weights; on real gradients a handful is enough. The result is the lesser of the
    Newton point of :math:`a` and the secant's, neither of which passes the root where
    :math:`\varphi'` is convex or concave between them.

    Args:
        slope: maps :math:`\gamma` (0-dim) to :math:`\varphi'(\gamma)` and its right derivative,
            0-dim.
        max_evaluations: how often ``slope`` is called at most; on an accelerator exactly
            :data:`FIXED_EVALUATIONS` times, unless this is less.
        like: a tensor whose dtype and device :math:`\gamma` takes; float64 on the CPU by default.

    Returns:
        :math:`\gamma`, 0-dim; an end point if :math:`\varphi'` has no root between.
    """
    like = torch.zeros((), dtype=torch.float64) if like is None else like
    early = readable(like)
    zero, one = like.new_zeros(()), like.new_ones(())
    evaluations = max_evaluations if early else min(max_evaluations, FIXED_EVALUATIONS)
    tolerance = 16 * torch.finfo(like.dtype).eps

    slope_b, bend_b = slope(one)
    if early and slope_b >= 0:
        return one
    slope_a, bend_a = slope(zero)
    if early and slope_a <= 0:
        return zero
    never, always = slope_a <= 0, slope_b >= 0

    a, b, gamma = zero, one, zero
    bisect = torch.zeros_like(never)
    for _ in range(evaluations - 2):
        newton_a, secant = a - slope_a / bend_a, a + (b - a) * slope_a / (slope_a - slope_b)
        newton_b = b - slope_b / bend_b
        # Where the slope is convex the root lies in [newton_a, secant], where it is concave in
        # [secant, newton_b]: Newton's method from the outer end does not overshoot.
        # On a straight line all three agree but for rounding, and newton_a has the least.
        concave = (newton_a > secant * (1 + tolerance)) & (newton_b > secant)
        point = torch.where(concave, newton_b, torch.minimum(newton_a, secant))
        inside = (a < point) & (point < b)
        if early and point <= b and (point - gamma).abs() <= tolerance * point:
            return point
        gamma = torch.where(bisect | ~inside, (a + b) / 2, point)
        slope_gamma, bend_gamma = slope(gamma)

        area, left = slope_a * (b - a), slope_gamma > 0
        a, b = torch.where(left, gamma, a), torch.where(left, b, gamma)
        slope_a = torch.where(left, slope_gamma, slope_a)
        slope_b = torch.where(left, slope_b, slope_gamma)
        bend_a = torch.where(left, bend_gamma, bend_a)
        bend_b = torch.where(left, bend_b, bend_gamma)
        bisect = slope_a * (b - a) > area / 2
    secant = a + (b - a) * slope_a / (slope_a - slope_b)
    gamma = torch.minimum(a - slope_a / bend_a, secant).clamp(a, b)
    return torch.where(always, one, torch.where(never, zero, gamma))


def climb(slope: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    r"""The root of :math:`\varphi'` on :math:`[0, 1]` where that is convex, from a point before it.

    Newton's method: a tangent of a convex function lies below it, so that no step passes the root,
    and one that leads to 1 or beyond shows that there is none before. If weights start inside their
    box, :math:`\varphi'` is convex and the closed form is such a point. Where no weight is blocked
    it is the root itself, which one evaluation tells. For tensors whose values can be read; should
    a handful of steps not be enough, :func:`maximize` does it.

    Args:
        slope: as in :func:`maximize`.
        start: a point where :math:`\varphi' \ge 0`, but for rounding, 0-dim.

    Returns:
        :math:`\gamma`, 0-dim.
    """
    tolerance = 16 * torch.finfo(start.dtype).eps
    gamma = start
    for _ in range(_CLIMB):
        value, bend = slope(gamma)
        if bend >= 0:  # nothing moves any more
            return torch.ones_like(gamma) if value > 0 else gamma
        point = gamma - value / bend
        if point >= 1:
            return torch.ones_like(gamma)
        if point <= gamma * (1 + tolerance):
            return torch.maximum(gamma, point)
        gamma = point
    return maximize(slope, MAX_EVALUATIONS - _CLIMB, like=start)


def readable(tensor: Tensor) -> bool:
    """Whether Python may branch on the values of ``tensor`` at no cost."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()

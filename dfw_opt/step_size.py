r"""The step size: the share :math:`\gamma` of the full step at which the plane reaches zero.

A step is a small convex problem for all variables at once, whose dual has a single variable,
:math:`\gamma \in [0, 1]`, and a slope that says how much of the plane is left:

.. math::

    \varphi'(\gamma) = h + \sum \langle m,\, v(\gamma) - v\rangle - \varepsilon\gamma, \qquad
    v(\gamma) = \Pi_C\bigl(v - \eta\,(\lambda v + \gamma D)\bigr) .

:math:`h` is the plane's height at :math:`v`, :math:`m` its gradient, :math:`D` the steepest
direction. Without constraints the slope is a straight line, and its root has a closed form. In a
box it is convex and piecewise linear, as every :math:`v` is in the box: Newton's method from the
closed form climbs to the root and never passes it. To project the step of the closed form is *not*
the same, for it ignores that blocked weights stop contributing.

Source: Berrada, Zisserman, Pawan Kumar, ICLR 2019 (arXiv 1811.07591), Section 3 and Algorithm 1;
the search in the box is ours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfw_opt.variables import Variable

NEWTON_STEPS = 8
"""Up to lr 1, four reach the root to the last digit, also where gradients lie over four decades; at
lr 1000 eight leave at most 1e-4 of the plane's height."""


def closed_form(height: Tensor, decay: Tensor, full: Tensor, eps: float) -> Tensor:
    r"""The root of :math:`\varphi'` without a box, or the end of :math:`[0, 1]` nearest to it.

    Args:
        height: :math:`h`, 0-dim.
        decay: :math:`\sum\eta\langle m, \lambda v\rangle`, 0-dim.
        full: :math:`\sum\eta\langle m, D\rangle`, what the full step takes from the plane, 0-dim.
        eps: :math:`\varepsilon \ge 0`.

    Returns:
        :math:`\gamma`, 0-dim: ``(height - decay) / (full + eps)`` in [0, 1], and 1 for 0/0.
    """
    return ((height - decay) / (full + eps)).nan_to_num(nan=1.0).clamp(0, 1)


def exact(
    height: Tensor,
    variables: Sequence[Variable],
    start: Tensor,
    eps: float | Tensor,
    gather: Callable[[list[Tensor]], Tensor] = torch.stack,
) -> Tensor:
    r"""The root of :math:`\varphi'` on :math:`[0, 1]` in a box, or the end nearest to it.

    Args:
        height: :math:`h`, less what variables that are not in a box take from it by decay, 0-dim.
        variables: those in a box, each value within its bounds.
        start: a point before the root, 0-dim: the closed form's.
        eps: :math:`\varepsilon`, and what the others' full step takes from the plane.
        gather: numbers as one tensor.

    Returns:
        :math:`\gamma`, 0-dim: the root to rounding on the gradients of networks, never beyond it.
    """
    gamma, n = start, len(variables)
    for _ in range(NEWTON_STEPS):
        slopes, bends = zip(*(v.dual_slope(gamma) for v in variables), strict=True)
        terms = gather([*slopes, *bends])
        slope, bend = height - eps * gamma + terms[:n].sum(), terms[n:].sum() - eps
        # Where nothing moves any more the slope is flat: above zero, the end is the maximum.
        newton = torch.where(bend < 0, -slope / bend, torch.where(slope > 0, 1.0, 0.0))
        gamma = (gamma + newton.nan_to_num(0).clamp(min=0)).clamp(max=1)  # NaN: eps overflows
    return gamma

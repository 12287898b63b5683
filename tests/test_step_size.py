"""γ: the closed form, and Newton's climb in a box, against exact arithmetic and brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Element
from torch import Tensor

from dfw_opt import step_size
from dfw_opt.variables import Variable


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([*terms]).sum() if terms else torch.zeros(())


@dataclass
class Problem:
    """A step of one or more tensors, each with settings of its own."""

    loss: float
    eps: float
    tensors: list[list[Element]]

    def elements(self) -> list[Element]:
        return [element for tensor in self.tensors for element in tensor]

    def fractions(self) -> list[Element]:
        names = ("value", "gradient", "lr", "weight_decay", "metric")
        return [
            Element(
                **{name: Fraction(getattr(e, name)) for name in names},
                lower=e.lower if math.isinf(e.lower) else Fraction(e.lower),
                upper=e.upper if math.isinf(e.upper) else Fraction(e.upper),
            )
            for e in self.elements()
        ]

    def root(self) -> Fraction:
        """γ without any rounding."""
        return Fraction(
            reference.exact_gamma(Fraction(self.loss), Fraction(self.eps), self.fractions())
        )

    def slope(self, gamma: float) -> Fraction:
        """What is left of the plane at γ, without any rounding."""
        loss, eps = Fraction(self.loss), Fraction(self.eps)
        return Fraction(reference.dual_slope(loss, eps, self.fractions(), Fraction(gamma)))

    def size(self) -> Fraction:
        """Of the terms that are summed: their rounding is what φ' is wrong by."""
        terms = [
            e.metric * abs(e.gradient) * (2 * abs(e.value) + min(e.lr * abs(e.gradient), e.upper))
            for e in self.fractions()
        ]
        return Fraction(self.loss) + sum(terms, Fraction(0))

    def variables(self) -> list[Variable]:
        result = []
        for tensor in self.tensors:
            e = tensor[0]
            values, gradients = ([getattr(e, n) for e in tensor] for n in ("value", "gradient"))
            D, plane = double(gradients), e.metric * double(gradients)
            bounds = (e.lr, e.weight_decay, e.lower, e.upper)
            result.append(Variable([double(values)], [D], [plane], *bounds))
        return result

    def dual_terms(self) -> tuple[Tensor, Tensor]:
        terms = [v.dual_terms() for v in self.variables()]
        return total([d for d, _ in terms if d is not None]), total([f for _, f in terms])

    def closed_form(self) -> Tensor:
        return step_size.closed_form(double(self.loss), *self.dual_terms(), self.eps)

    def climb(self) -> float:
        """The package's γ."""
        gamma = step_size.exact(double(self.loss), self.variables(), self.closed_form(), self.eps)
        assert gamma.dim() == 0
        return float(gamma)


sizes = st.floats(1e-4, 1.0).map(lambda x: float(np.float32(x)))
lrs = st.floats(-3, 3).map(lambda x: float(np.float32(10.0**x)))


@st.composite
def problems(draw: st.DrawFn, bounded: bool = True) -> Problem:
    """Values in their box, on its bounds too; gradients over four decades, lr to 1000.

    A scale has no upper bound and no decay; decay never leads out of a box (ηλ ≤ 1).
    """
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        radius = draw(st.sampled_from([1.0, 0.25, 2.0]))
        lower, upper = draw(st.sampled_from([(-radius, radius), (2.0**-10, math.inf)]))
        lr, metric = draw(lrs), draw(st.sampled_from([1.0, 0.01, 50.0]))
        decay = 0.0 if upper == math.inf else draw(st.sampled_from([0.0, 0.3, 1.0])) / lr
        top = min(upper, 4.0)
        value = st.floats(lower, top, width=32) | st.sampled_from([lower, top, max(lower, 0.0)])
        gradient = st.builds(math.copysign, sizes, st.sampled_from([-1.0, 1.0])) | st.just(0.0)
        if not bounded:
            lower, upper = -math.inf, math.inf
        element = st.builds(
            lambda v, g, rest=(lr, decay, metric, lower, upper): Element(v, g, *rest),
            value,
            gradient,
        )
        tensors.append(draw(st.lists(element, min_size=1, max_size=6)))
    # A share of all that can be taken from the plane, so that roots lie inside as well.
    elements = [e for tensor in tensors for e in tensor]
    most = sum(e.metric * abs(e.gradient) * min(e.lr * abs(e.gradient), 4.0) for e in elements)
    share = draw(st.sampled_from([0.0, 1e-4, 2.0]) | st.floats(0.0, 1.0))
    return Problem(float(share * most), draw(st.sampled_from([0.0, 1e-5])), tensors)


ROUNDING = Fraction(1, 10**13)


class TestClosedForm:
    @given(problems(bounded=False))
    def test_formula(self, problem: Problem) -> None:
        """In exact arithmetic; the slope tells how much rounding counts."""
        gamma, elements = float(problem.closed_form()), problem.fractions()
        loss, eps = Fraction(problem.loss), Fraction(problem.eps)
        expected = float(reference.closed_form_gamma(loss, eps, elements))
        steep = sum(e.lr * e.metric * e.gradient**2 for e in elements) + eps
        assert abs(gamma - expected) * steep <= ROUNDING * problem.size()

    # γ, and cases of the loss, what decay takes from the plane, what a whole step takes, and ε.
    VALUES: dict[float, list[tuple[float, ...]]] = {  # noqa: RUF012
        0.0: [(1, 1.5, 2, 0), (0, 0, 2, 0), (0, 0, 0, 1e-5), (0, 1, 0, 0)],
        0.25: [(1, 0.5, 2, 0), (1, 0, 2, 2)],
        0.5: [(1, 0, 2, 0)],
        0.75: [(1, -0.5, 2, 0)],
        1.0: [(3, 0, 2, 0), (1, 0, 0, 0), (0, 0, 0, 0)],
    }

    @pytest.mark.parametrize("expected", VALUES)
    def test_values(self, expected: float) -> None:
        for loss, decay, full, eps in self.VALUES[expected]:
            gamma = step_size.closed_form(double(loss), double(decay), double(full), eps)
            assert gamma.dim() == 0
            assert float(gamma) == expected


class TestSlope:
    @given(problems(), st.floats(0.0, 1.0))
    def test_value_and_right_derivative(self, problem: Problem, gamma: float) -> None:
        """In exact arithmetic, the derivative by a difference to the right."""
        problem.loss = problem.eps = 0.0
        terms = [v.dual_slope(double(gamma)) for v in problem.variables()]
        first, second = (float(total([pair[i] for pair in terms])) for i in (0, 1))
        expected = problem.slope(gamma)
        assert abs(Fraction(first) - expected) <= ROUNDING * problem.size()
        at, step = Fraction(gamma), Fraction(1, 10**12)
        points = [point for e in problem.fractions() for point in e.breakpoints()]
        if any(abs(point - at) <= Fraction(1, 10**9) for point in points):
            return  # a coordinate within rounding of a bound may fall on either side of it
        zero, elements = Fraction(0), problem.fractions()
        slope = (reference.dual_slope(zero, zero, elements, at + step) - expected) / step
        assert second == pytest.approx(float(slope), rel=1e-9, abs=1e-300)

    def test_right_derivative_at_a_bound(self) -> None:
        """On the bound and pushed out: no longer moves. On the bound and pushed in: moves."""
        for value, gradient, expected in ((1, -2, 0.0), (1, 2, -0.4), (-1, -2, -0.4), (-1, 2, 0.0)):
            (variable,) = Problem(0.0, 0.0, [[boxed(value, gradient)]]).variables()
            assert float(variable.dual_slope(double(0.0))[1]) == pytest.approx(expected)


class TestExact:
    @given(problems())
    def test_never_passes_the_zero_of_the_plane(self, problem: Problem) -> None:
        """Beyond the root only by rounding; before it, next to nothing of the plane is left.

        With up to 18 numbers eight evaluations leave 1 % of the plane at the very most, and that
        where some stand within 1e-3 of a step of their bound.
        """
        gamma, root = problem.climb(), problem.root()
        assert 0.0 <= gamma <= 1.0
        assert gamma >= float(problem.closed_form())
        slope = problem.slope(gamma)
        if gamma > 0:
            assert slope >= -ROUNDING * problem.size() or gamma <= root
        if gamma < 1:
            assert slope <= Fraction(problem.loss) / 100 + ROUNDING * problem.size()

    @given(problems())
    def test_reaches_the_root(self, problem: Problem) -> None:
        """Given as many evaluations as there are bends, to rounding."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_size, "NEWTON_STEPS", 3 + len(problem.elements()))
            gamma = problem.climb()
        root = problem.root()
        if abs(gamma - root) > 1e-9 * max(float(root), 1e-6):  # flat, to rounding
            assert abs(problem.slope(gamma)) <= ROUNDING * problem.size()

    @pytest.mark.parametrize("eps", [0.0, 1e-5])
    def test_nothing_moves(self, eps: float) -> None:
        """Blocked by the bound, or without a gradient: 1 if the plane is above zero."""
        for loss, element in ((1.0, boxed(1.0, -5.0)), (1.0, boxed(0.5, 0.0))):
            assert Problem(loss, eps, [[element]]).climb() == 1.0
        assert Problem(0.0, eps, [[boxed(1.0, -5.0)]]).climb() == 0.0

    def test_others_take_more_than_a_float_can_hold(self) -> None:
        (variable,) = Problem(0.0, 0.0, [[boxed(0.5, 1.0)]]).variables()
        assert step_size.exact(double(1.0), [variable], double(0.0), math.inf) == 0

    @pytest.mark.parametrize(
        ("steps", "lr", "left"),
        [
            # As in training. To the last digit:
            pytest.param(4, 0.0, 1e-12, id="4 steps, lr to 1"),
            # Where a whole step is a thousand boxes long, bends lie over all decades of γ.
            pytest.param(8, 3.0, 1e-3, id="8 steps, lr to 1000"),
        ],
    )
    @pytest.mark.parametrize("draw", ["normal", "four decades"])
    def test_how_many_evaluations(self, draw: str, steps: int, lr: float, left: float) -> None:
        """The share of the plane that is left at γ < 1, for weights anywhere in the box."""
        rng, worst = np.random.default_rng(0), 0.0
        for _ in range(150):
            n = int(rng.choice([5, 50, 1000]))
            gradient = rng.normal(0, 1, n)
            if draw == "four decades":
                gradient = 10 ** rng.uniform(-4, 0, n) * np.sign(gradient)
            value, eta = rng.uniform(-1, 1, n), 10 ** rng.uniform(-3, lr)
            room = np.where(gradient > 0, value + 1, 1 - value)
            most = np.abs(gradient) * np.minimum(eta * np.abs(gradient), room)
            loss = double(most.sum() * rng.uniform() ** rng.choice([0.1, 1, 3]))
            D = [double(gradient)]
            variable = Variable([double(value)], D, D, eta, lower=-1.0, upper=1.0)
            start = step_size.closed_form(loss, double(0.0), variable.dual_terms()[1], 0.0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step_size, "NEWTON_STEPS", steps)
                gamma = step_size.exact(loss, [variable], start, 0.0)
            if gamma < 1:
                share = float((loss + variable.dual_slope(gamma)[0]) / loss)
                assert share >= -1e-12
                worst = max(worst, share)
        assert worst <= left
        assert step_size.NEWTON_STEPS == 8


def boxed(value: float, gradient: float) -> Element:
    return replace(Element(value, gradient, 0.1), lower=-1.0, upper=1.0)

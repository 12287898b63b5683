"""γ: the closed form, and the exact search in a box, against brute force and exact arithmetic."""

from __future__ import annotations

import inspect
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

MAX_EVALUATIONS = inspect.signature(step_size.maximize).parameters["max_evaluations"].default


@dataclass
class Problem:
    """A proximal problem over one or more tensors, each with settings of its own."""

    loss: float
    eps: float
    tensors: list[list[Element]]

    def elements(self) -> list[Element]:
        return [element for tensor in self.tensors for element in tensor]

    def fractions(self) -> list[Element]:
        return [
            Element(
                value=Fraction(e.value),
                gradient=Fraction(e.gradient),
                lr=Fraction(e.lr),
                weight_decay=Fraction(e.weight_decay),
                metric=Fraction(e.metric),
                lower=e.lower if math.isinf(e.lower) else Fraction(e.lower),
                upper=e.upper if math.isinf(e.upper) else Fraction(e.upper),
            )
            for e in self.elements()
        ]

    def exact_gamma(self) -> Fraction:
        """Without any rounding."""
        return Fraction(
            reference.exact_gamma(Fraction(self.loss), Fraction(self.eps), self.fractions())
        )

    def slope(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """φ' and its right derivative, put together from the package's pieces."""
        first = self.loss - self.eps * gamma
        second = torch.full_like(gamma, -self.eps)
        for tensor in self.tensors:
            head = tensor[0]
            change, derivative = step_size.box_slope(
                gamma,
                torch.tensor([e.value for e in tensor], dtype=gamma.dtype),
                torch.tensor([e.gradient for e in tensor], dtype=gamma.dtype),
                head.lr,
                head.weight_decay,
                head.lower,
                head.upper,
            )
            first = first + head.metric * change
            second = second + head.metric * derivative
        return first, second

    def maximize(self) -> tuple[float, int]:
        """The package's γ in float64 and the number of evaluations that it took."""
        calls = 0

        def slope(gamma: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            return self.slope(torch.as_tensor(gamma, dtype=torch.float64))

        gamma = step_size.maximize(slope)
        assert isinstance(gamma, Tensor)
        assert gamma.dim() == 0
        return float(gamma), calls

    def relative_gap(self, gamma: float) -> float:
        """Primal value at v(γ) minus dual value at γ, relative to the sizes of the terms; ε = 0."""
        elements, exact = self.fractions(), Fraction(gamma)
        loss = Fraction(self.loss)
        slope = reference.dual_slope(loss, 0, elements, exact)
        gap = (1 - exact) * slope if slope > 0 else -exact * slope
        point = [e.at(exact) for e in elements]
        assert gap == reference.primal(loss, elements, point) - reference.dual(
            loss, elements, exact
        )
        size = loss + sum(
            e.metric * abs(e.gradient) * (abs(v) + abs(e.value))
            for e, v in zip(elements, point, strict=True)
        )
        return float(gap / size) if size else 0.0


def assert_agrees(problem: Problem, gamma: float, tolerance: float = 1e-9) -> None:
    """Equal to the exact root, or, where the dual is flat to rounding, as good as it."""
    assert 0.0 <= gamma <= 1.0
    exact = problem.exact_gamma()
    if abs(gamma - exact) <= tolerance * max(exact, Fraction(1, 10**6)):
        return
    # Rounding in φ' moves its root by as much as φ' is flat there.
    elements = problem.fractions()
    size = Fraction(problem.loss) + sum(
        e.metric * abs(e.gradient) * (abs(e.value) + abs(e.at(exact))) for e in elements
    )
    slope = reference.dual_slope(
        Fraction(problem.loss), Fraction(problem.eps), elements, Fraction(gamma)
    )
    assert abs(slope) <= 4e-15 * (1 + len(elements)) * size, (gamma, float(exact))


finite = st.floats(-1e3, 1e3, allow_nan=False, allow_infinity=False, width=32)
lrs = st.floats(2.0**-13, 8.0, width=32)


def elements_in(
    box: tuple[float, float], lr: float, weight_decay: float, metric: float
) -> st.SearchStrategy[list[Element]]:
    """Coordinates inside the box, on its bounds and outside; gradients of many sizes, zero too."""
    lower, upper = box
    values = st.one_of(
        st.floats(lower, min(upper, 4.0), width=32),
        st.sampled_from([lower, min(upper, 4.0), 0.0]),
        st.floats(-3.0, 3.0, width=32),
    )
    gradients = st.one_of(
        finite, st.floats(-1.0, 1.0, width=32), st.sampled_from([0.0, 1e-20, -1e-20, 1e6, -1e6])
    )
    return st.lists(
        st.builds(
            lambda value, gradient: Element(
                value, gradient, lr, weight_decay, metric, lower, upper
            ),
            values,
            gradients,
        ),
        min_size=1,
        max_size=6,
    )


@st.composite
def problems(draw: st.DrawFn, bounded: bool = True, eps: float | None = None) -> Problem:
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        radius = draw(st.sampled_from([1.0, 0.25, 2.0]))
        box = draw(st.sampled_from([(-radius, radius), (2.0**-10, math.inf)]))
        lr = draw(lrs)
        weight_decay = draw(st.sampled_from([0.0, 0.0, 1e-4, 0.5, 3.0]))
        metric = draw(st.sampled_from([1.0, 0.01, 50.0]))
        tensor = draw(elements_in(box, lr, weight_decay, metric))
        if not bounded:
            tensor = [Element(e.value, e.gradient, lr, weight_decay, metric) for e in tensor]
        tensors.append(tensor)
    loss = draw(st.one_of(st.floats(0.0, 10.0, width=32), st.sampled_from([0.0, 1e-6, 1e4])))
    return Problem(loss, draw(st.sampled_from([0.0, 1e-5])) if eps is None else eps, tensors)


def closed_form(loss: float, decay: float, curvature: float, eps: float) -> Tensor:
    numbers = torch.tensor([loss, decay, curvature], dtype=torch.float64)
    return step_size.closed_form(numbers[0], numbers[1], numbers[2], eps)


class TestClosedForm:
    @given(problems(bounded=False))
    def test_maximises_the_dual(self, problem: Problem) -> None:
        """Against a grid over [0, 1], and against steps to both sides."""
        elements = problem.elements()
        decay = sum(e.lr * e.metric * e.gradient * e.weight_decay * e.value for e in elements)
        curvature = sum(e.lr * e.metric * e.gradient**2 for e in elements)
        gamma = float(closed_form(problem.loss, decay, curvature, problem.eps))
        assert 0.0 <= gamma <= 1.0

        exact = problem.fractions()

        def value(at: float) -> Fraction:
            regularised = Fraction(problem.eps) * Fraction(at) ** 2 / 2
            return Fraction(
                reference.dual(Fraction(problem.loss), exact, Fraction(at)) - regularised
            )

        best = value(gamma)
        slack = Fraction(1e-12) * (abs(best) + Fraction(problem.loss))
        grid = [*np.linspace(0.0, 1.0, 41).tolist(), max(gamma - 1e-3, 0.0), min(gamma + 1e-3, 1.0)]
        assert all(value(at) <= best + slack for at in grid)

    @pytest.mark.parametrize(
        ("loss", "decay", "curvature", "eps", "expected"),
        [
            (1.0, 0.0, 2.0, 0.0, 0.5),
            (1.0, 0.5, 2.0, 0.0, 0.25),
            (1.0, -0.5, 2.0, 0.0, 0.75),
            (1.0, 0.0, 2.0, 2.0, 0.25),
            (3.0, 0.0, 2.0, 0.0, 1.0),
            (1.0, 1.5, 2.0, 0.0, 0.0),
            (0.0, 0.0, 2.0, 0.0, 0.0),
            (1.0, 0.0, 0.0, 0.0, 1.0),
            (0.0, 0.0, 0.0, 0.0, 1.0),
            (0.0, 0.0, 0.0, 1e-5, 0.0),
            (0.0, 1.0, 0.0, 0.0, 0.0),
        ],
    )
    def test_values(
        self, loss: float, decay: float, curvature: float, eps: float, expected: float
    ) -> None:
        gamma = closed_form(loss, decay, curvature, eps)
        assert gamma.dim() == 0
        assert float(gamma) == pytest.approx(expected, abs=1e-15)

    def test_is_the_clipped_polyak_step(self) -> None:
        """Without decay ηγ = min(η, ℓ/‖δ‖²)."""
        lr, square = 0.1, 7.0
        for loss in (0.1, 0.5, 2.0):
            gamma = closed_form(loss, 0.0, lr * square, 0.0)
            assert lr * float(gamma) == pytest.approx(min(lr, loss / square))


class TestBoxSlope:
    @given(problems(), st.floats(0.0, 1.0))
    def test_value_and_right_derivative(self, problem: Problem, gamma: float) -> None:
        """The value of φ' in exact arithmetic; its derivative by a difference to the right."""
        problem.loss = problem.eps = 0.0
        elements, at = problem.fractions(), Fraction(gamma)
        first, second = problem.slope(torch.tensor(gamma, dtype=torch.float64))
        size = sum(
            e.metric * abs(e.gradient) * (1 + abs(e.at(at)) + abs(e.value)) for e in elements
        )
        expected = reference.dual_slope(0, 0, elements, at)
        assert abs(Fraction(float(first)) - expected) <= Fraction(1e-13) * size
        assert float(second) <= 0.0

        # A coordinate within rounding of a bound may fall on either side of it.
        near = [e.breakpoints() for e in elements]
        if any(abs(point - at) <= Fraction(1e-9) for points in near for point in points):
            return
        for e in elements:
            if e.gradient == 0 or abs(e.lr * e.gradient) < 1e-12:
                return
        step = Fraction(1, 10**12)
        slope = (reference.dual_slope(0, 0, elements, at + step) - expected) / step
        assert float(second) == pytest.approx(float(slope), rel=1e-9, abs=1e-300)

    def test_right_derivative_at_a_bound(self) -> None:
        """On the bound and pushed out: no longer moves. On the bound and pushed in: moves."""
        for value, gradient, expected in ((1.0, -2.0, 0.0), (1.0, 2.0, -0.4), (-1.0, -2.0, -0.4)):
            _, derivative = step_size.box_slope(
                torch.tensor(0.0),
                torch.tensor([value]),
                torch.tensor([gradient]),
                0.1,
                0.0,
                -1.0,
                1.0,
            )
            assert float(derivative) == pytest.approx(expected)

    def test_shapes(self) -> None:
        first, second = step_size.box_slope(
            torch.tensor(0.5), torch.zeros(2, 3, 4), torch.ones(2, 3, 4), 0.1, 0.0, -1.0, 1.0
        )
        assert first.dim() == 0
        assert second.dim() == 0
        assert float(first) == pytest.approx(24 * -0.05)
        assert float(second) == pytest.approx(24 * -0.1)


class TestExactSearch:
    @given(problems())
    def test_equals_breakpoint_sorting(self, problem: Problem) -> None:
        gamma, calls = problem.maximize()
        assert calls <= MAX_EVALUATIONS
        assert_agrees(problem, gamma)

    @given(problems(eps=0.0))
    def test_closes_the_primal_dual_gap(self, problem: Problem) -> None:
        gamma, _ = problem.maximize()
        assert -1e-15 <= problem.relative_gap(gamma) <= 1e-12

    @given(problems(eps=0.0))
    def test_never_worse_than_clipping_the_closed_form(self, problem: Problem) -> None:
        elements, loss = problem.fractions(), Fraction(problem.loss)

        def objective(gamma: Fraction) -> Fraction:
            return Fraction(reference.primal(loss, elements, [e.at(gamma) for e in elements]))

        gamma, _ = problem.maximize()
        clipped = Fraction(reference.closed_form_gamma(loss, 0, elements))
        ours, theirs = objective(Fraction(gamma)), objective(clipped)
        size = loss + sum(e.metric * abs(e.gradient) * (1 + abs(e.value)) for e in elements)
        assert ours <= theirs + Fraction(1e-12) * size

    def test_better_than_clipping_the_closed_form(self) -> None:
        """A coordinate at its bound counts in the closed form though it cannot move."""
        problem = Problem(1.0, 0.0, [[box_element(1.0, -3.0), box_element(0.0, 2.0)]])
        gamma, _ = problem.maximize()
        elements = problem.elements()
        # Only the second coordinate moves: γ = 1 / (η 2²) > 1; the closed form: 1 / (η (3² + 2²)).
        assert gamma == 1.0
        clipped = reference.closed_form_gamma(1.0, 0.0, elements)
        assert clipped == pytest.approx(1.0 / 1.3)
        ours, theirs = (
            reference.primal(1.0, elements, [e.at(at) for e in elements]) for at in (gamma, clipped)
        )
        assert ours < theirs - 1e-3

    @given(problems(bounded=False))
    def test_equals_the_closed_form_without_bounds(self, problem: Problem) -> None:
        gamma, calls = problem.maximize()
        expected = reference.closed_form_gamma(
            Fraction(problem.loss), Fraction(problem.eps), problem.fractions()
        )
        assert gamma == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
        assert calls <= MAX_EVALUATIONS

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
    def test_straight_line_takes_one_newton_step(self, share: float) -> None:
        """Its two ends, the root, and perhaps a neighbour that rounding makes of it."""
        tensor = [Element(0.5, 3.0, 0.1), Element(-0.25, -1.0, 0.1), Element(0.0, 2.0, 0.1)]
        problem = Problem(share * 0.1 * 14.0, 0.0, [tensor])
        gamma, calls = problem.maximize()
        assert gamma == pytest.approx(share)
        assert calls <= 4

    @pytest.mark.parametrize("ratio", [2.0, 10.0, 1e3])
    @pytest.mark.parametrize("count", [8, 24])
    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_geometric_breakpoints(self, ratio: float, count: int, share: float) -> None:
        """Breakpoints at all magnitudes of γ: Newton leaves them behind one at a time."""
        if ratio**count > 1e72:
            pytest.skip("beyond what a squared gradient norm holds")
        tensor = [box_element(0.0, -(ratio**power)) for power in range(count)]
        problem = Problem(share * sum(abs(e.gradient) for e in tensor), 0.0, [tensor])
        gamma, calls = problem.maximize()
        assert calls <= MAX_EVALUATIONS
        assert_agrees(problem, gamma)
        assert problem.relative_gap(gamma) <= 1e-12

    @pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
    def test_many_breakpoints(self, power: float, share: float) -> None:
        """Hundreds of breakpoints, dense near 0 or near 1."""
        points = (np.arange(1, 301) / 300.0) ** power
        tensor = [box_element(0.0, -1.0 / (0.1 * float(point))) for point in points]
        problem = Problem(share * sum(abs(e.gradient) for e in tensor), 0.0, [tensor])
        gamma, calls = problem.maximize()
        assert calls <= MAX_EVALUATIONS
        assert_agrees(problem, gamma)

    def test_kink_that_traps_newton(self) -> None:
        """A flat piece, then a steep one: coordinates outside the box start to move late."""
        outside = [box_element(3.0, 1e4, lr=1e-3) for _ in range(50)]
        problem = Problem(1e5, 0.0, [[*outside, box_element(0.0, 1.0)]])
        gamma, calls = problem.maximize()
        assert calls <= MAX_EVALUATIONS
        assert_agrees(problem, gamma)

    def test_typical_problems_take_few_evaluations(self) -> None:
        """Gaussian weights and gradients, ten thousand of them."""
        generator = np.random.default_rng(0)
        counts = []
        for _ in range(20):
            value = torch.tensor(generator.uniform(-1, 1, 10_000))
            gradient = torch.tensor(generator.normal(0, 5, 10_000))
            lr = float(generator.choice([0.03, 0.1, 0.3]))
            loss = float(generator.uniform(0.05, 0.95) * (gradient.abs() * 0.3).sum())
            calls = 0

            def slope(
                gamma: Tensor,
                value: Tensor = value,
                gradient: Tensor = gradient,
                lr: float = lr,
                loss: float = loss,
            ) -> tuple[Tensor, Tensor]:
                nonlocal calls
                calls += 1
                change, derivative = step_size.box_slope(gamma, value, gradient, lr, 0.0, -1.0, 1.0)
                return loss + change, derivative

            gamma = step_size.maximize(slope)
            change, _ = step_size.box_slope(gamma, value, gradient, lr, 0.0, -1.0, 1.0)
            if 0.0 < float(gamma) < 1.0:
                assert abs(loss + float(change)) <= 1e-9 * loss
            counts.append(calls)
        assert max(counts) <= 15

    @pytest.mark.parametrize("allowed", [2, 3, 5])
    def test_stops_at_the_given_number_of_evaluations(self, allowed: int) -> None:
        """Out of evaluations it returns what it has: a number in [0, 1]."""
        tensor = [box_element(0.0, -(4.0**power)) for power in range(20)]
        problem = Problem(0.9 * sum(abs(e.gradient) for e in tensor), 0.0, [tensor])
        calls = 0

        def slope(gamma: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            return problem.slope(torch.as_tensor(gamma, dtype=torch.float64))

        gamma = float(step_size.maximize(slope, max_evaluations=allowed))
        assert calls <= allowed
        assert 0.0 <= gamma <= 1.0

    @pytest.mark.parametrize(
        ("tensor", "loss"),
        [
            pytest.param([(1.0, -5.0), (-1.0, 5.0)], 1.0, id="all at their bound, pushed out"),
            pytest.param([(1.0, 5.0), (-1.0, -5.0)], 1.0, id="all at their bound, pushed in"),
            pytest.param([(0.5, 0.0), (-0.2, 0.0)], 1.0, id="no gradient"),
            pytest.param([(0.5, 0.0), (-0.2, 0.0)], 0.0, id="no gradient, no loss"),
            pytest.param([(0.5, 3.0)], 0.0, id="no loss"),
            pytest.param([(5.0, 3.0), (-4.0, 3.0)], 0.1, id="outside the box"),
            pytest.param([(5.0, -3.0)], 100.0, id="outside the box, pushed out"),
            pytest.param([(0.0, 1e-30), (0.0, 1e8)], 1.0, id="gradients of all sizes"),
            pytest.param([(0.0, 1.0)], 1e-12, id="nearly no loss"),
            pytest.param([(-0.0, 1.0)], 0.05, id="one element"),
        ],
    )
    @pytest.mark.parametrize("weight_decay", [0.0, 0.5, 10.0, 25.0])
    def test_corner_cases(
        self, tensor: Sequence[tuple[float, float]], loss: float, weight_decay: float
    ) -> None:
        """Decay up to η λ > 2, where the decayed point lands on the other side of zero."""
        elements = [box_element(*pair, weight_decay=weight_decay) for pair in tensor]
        for eps in (0.0, 1e-5):
            problem = Problem(loss, eps, [elements])
            gamma, calls = problem.maximize()
            assert calls <= MAX_EVALUATIONS
            assert_agrees(problem, gamma)

    @given(problems(eps=0.0))
    def test_fixed_number_of_evaluations(self, problem: Problem) -> None:
        """As on an accelerator: always as many, and within the promised bound of the maximum."""
        calls = 0

        def slope(gamma: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            return problem.slope(gamma)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_size, "readable", lambda tensor: False)
            gamma = float(step_size.maximize(slope))
        assert calls == step_size.FIXED_EVALUATIONS
        assert 0.0 <= gamma <= 1.0
        elements, loss = problem.fractions(), Fraction(problem.loss)
        best = reference.dual(loss, elements, problem.exact_gamma())
        short = best - reference.dual(loss, elements, Fraction(gamma))
        halvings = (step_size.FIXED_EVALUATIONS - 2) // 2
        start = max(reference.dual_slope(loss, 0, elements, 0), loss)
        size = loss + sum(e.metric * abs(e.gradient) * (1 + abs(e.value)) for e in elements)
        assert short <= start / 2**halvings + Fraction(1e-12) * size

    @given(problems())
    def test_float32(self, problem: Problem) -> None:
        """In single precision φ' is zero at γ, to rounding, or has the sign of its end point."""
        gamma = float(step_size.maximize(problem.slope, like=torch.zeros((), dtype=torch.float32)))
        assert 0.0 <= gamma <= 1.0
        elements = problem.fractions()
        slope = float(
            reference.dual_slope(
                Fraction(problem.loss), Fraction(problem.eps), elements, Fraction(gamma)
            )
        )
        size = problem.loss + sum(
            abs(e.metric * e.gradient) * (abs(e.value) * (1 + e.lr * e.weight_decay) + 3.0)
            + e.metric * e.lr * float(e.gradient) ** 2 * gamma * (e.upper == math.inf)
            for e in problem.elements()
        )
        # γ itself is rounded: a steep φ' changes by its slope times that.
        steep = sum(e.metric * e.lr * float(e.gradient) ** 2 for e in problem.elements())
        tolerance = 3e-6 * size + 3e-7 * gamma * steep + 1e-30
        if gamma == 1.0:
            assert slope >= -tolerance
        elif gamma == 0.0:
            assert slope <= tolerance
        else:
            assert abs(slope) <= tolerance


class TestClimb:
    """From inside the box: Newton's method from the closed form."""

    @given(problem=problems())
    def test_equals_breakpoint_sorting(self, problem: Problem) -> None:
        gamma, calls = climbed(problem)
        assert_agrees(problem, gamma)
        assert calls <= MAX_EVALUATIONS

    def test_one_evaluation_where_nothing_is_blocked(self) -> None:
        problem = Problem(0.3, 0.0, [[box_element(0.0, 1.0), box_element(0.1, -2.0)]])
        gamma, calls = climbed(problem)
        assert gamma == pytest.approx(0.6)
        assert calls == 1

    def test_blocked_at_once(self) -> None:
        """All weights but one stand on the bound that they are pushed against."""
        stuck = [box_element(1.0, -100.0) for _ in range(20)]
        problem = Problem(0.05, 0.0, [[*stuck, box_element(0.0, 1.0)]])
        gamma, calls = climbed(problem)
        assert gamma == pytest.approx(0.5)
        assert calls <= 3

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_more_kinks_than_steps(self, share: float) -> None:
        """Newton leaves them behind one at a time; in the end the bracketed search takes over."""
        tensor = [box_element(0.0, -(10.0**power)) for power in range(24)]
        problem = Problem(share * sum(abs(e.gradient) for e in tensor), 0.0, [tensor])
        gamma, calls = climbed(problem)
        assert_agrees(problem, gamma)
        assert calls <= MAX_EVALUATIONS

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_all_blocked(self, zero: float) -> None:
        """Whichever zero the slope's slope is."""
        slope = {"value": torch.tensor(0.5), "bend": torch.tensor(zero)}
        gamma = step_size.climb(lambda gamma: (slope["value"], slope["bend"]), torch.tensor(0.5))
        assert gamma == 1.0

    def test_root_beyond_1(self) -> None:
        """The closed form is below 1, but what is blocked makes no progress."""
        problem = Problem(1.0, 0.0, [[box_element(1.0, -100.0), box_element(0.0, 1.0)]])
        gamma, _ = climbed(problem)
        assert gamma == 1.0


def climbed(problem: Problem) -> tuple[float, int]:
    """γ by `climb`, and its evaluations, for the problem moved into its boxes."""
    inside = []
    for tensor in problem.tensors:
        values = [replace(e, value=min(max(e.value, e.lower), e.upper)) for e in tensor]
        # Nor must decay lead out of it: a scale, whose box is above 0, has none.
        decay = 0 if tensor[0].lower > 0 else min(tensor[0].weight_decay, 1 / tensor[0].lr)
        inside.append([replace(e, weight_decay=decay) for e in values])
    problem.tensors = inside
    calls = 0

    def slope(gamma: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return problem.slope(gamma)

    start = reference.closed_form_gamma(
        Fraction(problem.loss), Fraction(problem.eps), problem.fractions()
    )
    if start in (0, 1):
        return float(start), 0
    return float(step_size.climb(slope, torch.tensor(float(start), dtype=torch.float64))), calls


def box_element(
    value: float, gradient: float, weight_decay: float = 0.0, lr: float = 0.1
) -> Element:
    return Element(value, gradient, lr, weight_decay, 1.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("flat", "expected"),
    [pytest.param(True, 1.0, id="flat"), pytest.param(False, 0.0, id="flat, then falling")],
)
def test_end_points_on_an_accelerator(
    flat: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0/0 is never looked at."""
    monkeypatch.setattr(step_size, "readable", lambda tensor: False)

    def slope(gamma: Tensor) -> tuple[Tensor, Tensor]:
        if flat:
            return torch.zeros_like(gamma), torch.zeros_like(gamma)
        late = gamma >= 0.5
        return torch.where(late, 1.0 - 2 * gamma, 0.0), torch.where(late, -2.0, 0.0)

    assert float(step_size.maximize(slope)) == expected

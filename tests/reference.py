"""The formulas of the optimizers, transcribed literally, for the tests to compare with.

Plain Python numbers and float64 numpy, one formula a line, loops where the mathematics has sums.
Nothing is shared with the package. The search for γ works on any exact number type as well: the
step-size tests run it on fractions, where sorting the breakpoints gives γ without rounding.

Notation: η = lr, λ = weight decay, ε = eps, μ = momentum, ℓ = loss. A step moves variables v: float
parameters, normalised latent weights u, ternary scales W_p and W_n. Each is measured in a metric M,
the squared change that a unit step makes in the forward weights; d = M⁻¹δ is its gradient δ in that
metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = Any  # a float or a Fraction: the search below is the same for both

SCALE_MIN = 1e-3


# --------------------------------------------------------------------------------------------------
# The search for γ
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Element:
    """One coordinate of one variable."""

    value: Number
    gradient: Number  # d, in the metric
    lr: Number
    weight_decay: Number = 0
    metric: Number = 1
    lower: Number = -math.inf
    upper: Number = math.inf

    def at(self, gamma: Number) -> Number:
        """v(γ) = Π(v − η(λv + γd))."""
        free = self.value - self.lr * (self.weight_decay * self.value + gamma * self.gradient)
        return min(max(free, self.lower), self.upper)

    def breakpoints(self) -> list[Number]:
        """The γ at which the unprojected point meets a bound."""
        speed = -self.lr * self.gradient
        if speed == 0:
            return []
        start = self.value - self.lr * self.weight_decay * self.value
        return [
            (bound - start) / speed for bound in (self.lower, self.upper) if not math.isinf(bound)
        ]


def total(terms: Iterable[Number]) -> Number:
    """A sum without rounding of its own."""
    numbers = list(terms)
    return sum(numbers) if numbers and isinstance(numbers[0], Fraction) else math.fsum(numbers)


def dual_slope(loss: Number, eps: Number, elements: Sequence[Element], gamma: Number) -> Number:
    """φ'(γ) = ℓ + ⟨d, v(γ) − v⟩_M − εγ."""
    change = total(e.metric * e.gradient * (e.at(gamma) - e.value) for e in elements)
    return loss + change - eps * gamma


def closed_form_gamma(loss: Number, eps: Number, elements: Sequence[Element]) -> Number:
    """γ = clip[0,1]((ℓ − Σ ηM⟨d, λv⟩) / (Σ ηM‖d‖² + ε))."""
    decay = total(e.lr * e.metric * e.gradient * e.weight_decay * e.value for e in elements)
    curvature = total(e.lr * e.metric * e.gradient * e.gradient for e in elements)
    numerator, denominator = loss - decay, curvature + eps
    if numerator >= denominator:
        return 1
    return max(numerator / denominator, 0)


def exact_gamma(loss: Number, eps: Number, elements: Sequence[Element]) -> Number:
    """The root of φ' on [0, 1], found by sorting the points where φ' bends; else an end point."""
    inside = {point for e in elements for point in e.breakpoints() if 0 < point < 1}
    points = [0, *sorted(inside), 1]
    if dual_slope(loss, eps, elements, 1) >= 0:
        return 1
    if dual_slope(loss, eps, elements, 0) <= 0:
        return 0
    low, high = 0, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if dual_slope(loss, eps, elements, points[middle]) >= 0:
            low = middle
        else:
            high = middle
    left, right = points[low], points[high]
    above = dual_slope(loss, eps, elements, left)
    below = dual_slope(loss, eps, elements, right)
    return left + (right - left) * above / (above - below)


def primal(loss: Number, elements: Sequence[Element], point: Sequence[Number]) -> Number:
    """½η⁻¹‖v − v_t‖²_M + ⟨r, v − v_t⟩_M + max(0, ℓ + ⟨d, v − v_t⟩_M), with r = λv_t."""
    pairs = list(zip(elements, point, strict=True))
    proximal = total(e.metric * (v - e.value) ** 2 / (2 * e.lr) for e, v in pairs)
    decay = total(e.metric * e.weight_decay * e.value * (v - e.value) for e, v in pairs)
    linear = loss + total(e.metric * e.gradient * (v - e.value) for e, v in pairs)
    return proximal + decay + max(0, linear)


def dual(loss: Number, elements: Sequence[Element], gamma: Number) -> Number:
    """The smallest value over the box of the same with max(0, s) replaced by γs; taken at v(γ)."""
    point = [(e, e.at(gamma)) for e in elements]
    proximal = total(e.metric * (v - e.value) ** 2 / (2 * e.lr) for e, v in point)
    decay = total(e.metric * e.weight_decay * e.value * (v - e.value) for e, v in point)
    linear = loss + total(e.metric * e.gradient * (v - e.value) for e, v in point)
    return proximal + decay + gamma * linear


# --------------------------------------------------------------------------------------------------
# Whole optimizers
# --------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """The hyper-parameters of one group."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    eps: float = 1e-5
    quantizer: str | None = None
    radius: float | None = None
    threshold: float = 0.05
    bits: int = 4
    step_size: str = "exact"
    relaxation: float = 0.0


@dataclass
class Variable:
    """Something that a step moves, with its bounds and its momentum z."""

    value: Array
    lower: float = -math.inf
    upper: float = math.inf
    decays: bool = True
    momentum: Array = field(init=False)

    def __post_init__(self) -> None:
        self.momentum = np.zeros_like(self.value)


@dataclass
class Move:
    """A variable, its gradient d and metric M in this step."""

    variable: Variable
    gradient: Array
    metric: float
    settings: Settings

    def weight_decay(self) -> float:
        return self.settings.weight_decay if self.variable.decays else 0.0

    def elements(self) -> list[Element]:
        """What the search sees: a closed-form group enters it as if it had no bounds."""
        bounded = self.settings.step_size == "exact"
        return [
            Element(
                value=float(value),
                gradient=float(gradient),
                lr=self.settings.lr,
                weight_decay=self.weight_decay(),
                metric=self.metric,
                lower=self.variable.lower if bounded else -math.inf,
                upper=self.variable.upper if bounded else math.inf,
            )
            for value, gradient in zip(self.variable.value.flat, self.gradient.flat, strict=True)
        ]

    def apply(self, gamma: float) -> None:
        """Move: z ← μz − ηγ(d + λv);  v ← Π(v − η(λv + γd) + μz)."""
        lr, mu, decay = self.settings.lr, self.settings.momentum, self.weight_decay()
        v, d, z = self.variable.value, self.gradient, self.variable.momentum
        z = mu * z - lr * gamma * (d + decay * v)
        v = v - lr * (decay * v + gamma * d) + mu * z
        self.variable.momentum = z
        self.variable.value = np.minimum(np.maximum(v, self.variable.lower), self.variable.upper)


class FloatParameter:
    """A parameter that moves itself: M = 1, in a box if it has a radius."""

    def __init__(self, weights: Array, settings: Settings) -> None:
        radius = math.inf if settings.radius is None else settings.radius
        self.settings = settings
        weights = np.clip(np.array(weights, dtype=np.float64), -radius, radius)
        self.weights = Variable(weights, -radius, radius)

    def forward(self) -> Array:
        return self.weights.value

    def moves(self, gradient: Array) -> list[Move]:
        return [Move(self.weights, np.asarray(gradient, dtype=np.float64), 1.0, self.settings)]


def normalise(weights: Array, settings: Settings) -> tuple[float, Variable]:
    """Latents u = w / c with c = max|w|, in [−R, R]."""
    radius = math.inf if settings.radius is None else settings.radius
    weights = np.array(weights, dtype=np.float64)
    unit = float(np.abs(weights).max())
    unit = unit if unit > 0 else 1.0
    return unit, Variable(np.clip(weights / unit, -radius, radius), -radius, radius)


def sign(values: Array) -> Array:
    """The sign, +1 for 0."""
    return np.where(values >= 0, 1.0, -1.0)


class BinaryParameter:
    """Q = c·a·sign(u), a = mean|u| of the output channel."""

    def __init__(self, weights: Array, settings: Settings) -> None:
        self.settings = settings
        self.unit, self.latent = normalise(weights, settings)

    def forward(self) -> Array:
        u = self.latent.value
        result = np.empty_like(u)
        for channel in range(u.shape[0]):
            a = np.abs(u[channel]).mean()
            result[channel] = self.unit * a * sign(u[channel])
        return result

    def moves(self, gradient: Array) -> list[Move]:
        """δ_i = c(a + 1/n) g_i,  M = c² mean((a + 1/n)(a + 1))."""
        c, u = self.unit, self.latent.value
        delta = np.empty_like(u)
        n = u[0].size
        for channel in range(u.shape[0]):
            a = np.abs(u[channel]).mean()
            delta[channel] = c * (a + 1 / n) * gradient[channel]
        scales = [np.abs(u[channel]).mean() for channel in range(u.shape[0])]
        metric = c * c * float(np.mean([(a + 1 / n) * (a + 1) for a in scales]))
        return [Move(self.latent, delta / metric, metric, self.settings)]


class TernaryParameter:
    """Q = c·W_p above Δ, −c·W_n below −Δ, 0 between; Δ = t·max|u|."""

    def __init__(self, weights: Array, settings: Settings) -> None:
        self.settings = settings
        self.unit, self.latent = normalise(weights, settings)
        above, below = self.zones()
        magnitude = np.abs(self.latent.value)
        self.scale_pos = Variable(np.array(magnitude[above].mean()), SCALE_MIN, decays=False)
        self.scale_neg = Variable(np.array(magnitude[below].mean()), SCALE_MIN, decays=False)

    def zones(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        u = self.latent.value
        threshold = self.settings.threshold * np.abs(u).max()
        return u > threshold, u < -threshold

    def forward(self) -> Array:
        above, below = self.zones()
        result = np.zeros_like(self.latent.value)
        result[above] = self.unit * self.scale_pos.value
        result[below] = -self.unit * self.scale_neg.value
        return result

    def moves(self, gradient: Array) -> list[Move]:
        """δ_u = c·(W_p g, g, W_n g), δ_Wp = c Σ₊g, δ_Wn = −c Σ₋g.

        M = c²(n₊W_p² + n₀ + n₋W_n²)/n, c²n₊, c²n₋.
        """
        c = self.unit
        above, below = self.zones()
        delta = c * gradient
        delta[above] = c * self.scale_pos.value * gradient[above]
        delta[below] = c * self.scale_neg.value * gradient[below]
        delta_pos = np.array(c * gradient[above].sum())
        delta_neg = np.array(-c * gradient[below].sum())
        slopes = np.where(above, self.scale_pos.value, np.where(below, self.scale_neg.value, 1.0))
        metric_latent = c * c * float(np.square(slopes).mean())
        metric_pos = c * c * max(int(above.sum()), 1)
        metric_neg = c * c * max(int(below.sum()), 1)
        return [
            Move(self.latent, delta / metric_latent, metric_latent, self.settings),
            Move(self.scale_pos, delta_pos / metric_pos, metric_pos, self.settings),
            Move(self.scale_neg, delta_neg / metric_neg, metric_neg, self.settings),
        ]


class UniformParameter:
    """Q = c·a·round(q·u/a)/q, a = max|u| of the output channel, q = 2^(bits − 1) − 1."""

    def __init__(self, weights: Array, settings: Settings) -> None:
        self.settings = settings
        self.unit, self.latent = normalise(weights, settings)

    def forward(self) -> Array:
        u = self.latent.value
        q = 2 ** (self.settings.bits - 1) - 1
        result = np.zeros_like(u)
        for channel in range(u.shape[0]):
            a = np.abs(u[channel]).max()
            if a > 0:
                result[channel] = self.unit * a * np.round(q * u[channel] / a) / q
        return result

    def moves(self, gradient: Array) -> list[Move]:
        """δ = c·g,  M = c²."""
        c = self.unit
        return [Move(self.latent, c * gradient / (c * c), c * c, self.settings)]


class RelaxedParameter:
    """Q_θ = (1 − θ) Q + θ c u, where Q is that of another parameter."""

    def __init__(self, quantized: BinaryParameter | TernaryParameter | UniformParameter) -> None:
        self.quantized, self.settings = quantized, quantized.settings
        self.unit, self.latent = quantized.unit, quantized.latent

    def forward(self) -> Array:
        theta = self.settings.relaxation
        return (1 - theta) * self.quantized.forward() + theta * self.unit * self.latent.value

    def moves(self, gradient: Array) -> list[Move]:
        """δ_θ = (1 − θ) δ + θ c g,  M_θ = ((1 − θ) √M + θ c)²;  d_θ = (1 − θ) d of a scale."""
        theta, c = self.settings.relaxation, self.unit
        hard, *scales = self.quantized.moves(gradient)
        delta = (1 - theta) * hard.metric * hard.gradient + theta * c * gradient
        metric = ((1 - theta) * math.sqrt(hard.metric) + theta * c) ** 2
        return [
            Move(self.latent, delta / metric, metric, self.settings),
            *(Move(s.variable, (1 - theta) * s.gradient, s.metric, s.settings) for s in scales),
        ]


Parameter = (
    FloatParameter | BinaryParameter | TernaryParameter | UniformParameter | RelaxedParameter
)


def make_parameter(weights: Array, settings: Settings) -> Parameter:
    if settings.quantizer == "binary":
        return BinaryParameter(weights, settings)
    if settings.quantizer == "ternary":
        return TernaryParameter(weights, settings)
    if settings.quantizer == "uniform":
        return UniformParameter(weights, settings)
    return FloatParameter(weights, settings)


def best_gamma(loss: float, eps: float, moves: Sequence[Move]) -> float:
    elements = [element for move in moves for element in move.elements()]
    if all(math.isinf(e.lower) and math.isinf(e.upper) for e in elements):
        return float(closed_form_gamma(loss, eps, elements))
    return float(exact_gamma(loss, eps, elements))


def step(parameters: Sequence[Parameter], loss: float, gradients: Sequence[Array | None]) -> float:
    """One step of all parameters with a gradient, one γ for all. Returns γ."""
    moves = [
        move
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
        for move in parameter.moves(gradient)
    ]
    gamma = best_gamma(loss, parameters[0].settings.eps, moves)
    for move in moves:
        move.apply(gamma)
    return gamma

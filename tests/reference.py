"""The formulas of the optimizers, transcribed literally, for the tests to compare with.

Plain Python numbers and float64 numpy, one formula a line, loops where the mathematics has sums.
Nothing is shared with the package. The search for γ works on any exact number type as well: the
step-size tests run it on fractions, where sorting the breakpoints gives γ without rounding.

Notation: η = lr, λ = weight decay, ε = eps, μ = momentum, ℓ = loss. A step moves variables v: float
parameters, normalised latent weights u, ternary scales W_p and W_n. In the Euclidean norm each is
measured in a metric M, the squared change that a unit step makes in the forward weights; d = M⁻¹δ
is its gradient δ in that metric. In the spectral norm m is the running mean of its gradients, D the
direction of its step, ρ the size of that.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = Any  # a float or a Fraction: the search below is the same for both

SCALE_MIN = 1e-3


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
    last = bisect.bisect(points, 0, key=lambda at: -dual_slope(loss, eps, elements, at))
    left, right = points[last - 1], points[last]
    above, below = (dual_slope(loss, eps, elements, at) for at in (left, right))
    return left + (right - left) * above / (above - below)


@dataclass
class Settings:
    """The hyper-parameters of one group."""

    norm: str = "spectral"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    eps: float = 1e-5
    quantizer: str | None = None
    radius: float | None = None
    threshold: float | None = None
    bits: int | None = None
    step_size: str = "exact"
    relaxation: float = 0.0
    layout: str = "matrix"
    scale_axis: int | tuple[int, ...] = 0
    scale_groups: int = 1

    @property
    def bound(self) -> float:
        return math.inf if self.radius is None else self.radius


@dataclass
class Variable:
    """Something that a step moves: bounds, momentum z, mean gradient m, and size ρ of its steps."""

    value: Array
    size: float
    lower: float = -math.inf
    upper: float = math.inf
    decays: bool = True
    momentum: Array = field(init=False)
    mean: Array = field(init=False)

    def __post_init__(self) -> None:
        self.momentum = np.zeros_like(self.value)
        self.mean = np.zeros_like(self.value)


@dataclass
class Move:
    """A variable, its gradient δ and metric M in this step."""

    variable: Variable
    delta: Array
    metric: float
    settings: Settings

    @property
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
                weight_decay=self.weight_decay,
                metric=self.metric,
                lower=self.variable.lower if bounded else -math.inf,
                upper=self.variable.upper if bounded else math.inf,
            )
            for value, gradient in zip(
                self.variable.value.flat, (self.delta / self.metric).flat, strict=True
            )
        ]

    def apply(self, gamma: float) -> None:
        """With momentum: z ← μz − ηγ(d + λv);  v ← Π(v − η(λv + γd) + μz)."""
        lr, mu, decay = self.settings.lr, self.settings.momentum, self.weight_decay
        v, d, z = self.variable.value, self.delta / self.metric, self.variable.momentum
        z = mu * z - lr * gamma * (d + decay * v)
        self.variable.momentum = z
        self.place(v - lr * (decay * v + gamma * d) + mu * z)

    def average(self, first: bool) -> Array:
        """The plane: m ← μm + (1 − μ)δ, at first m = δ. Returns D = ρ · oracle(μm + (1 − μ)δ)."""
        mu = self.settings.momentum
        m = self.delta if first else mu * self.variable.mean + (1 - mu) * self.delta
        self.variable.mean = m
        ahead = mu * m + (1 - mu) * self.delta
        return self.variable.size * steepest(ahead, self.settings.layout, self.delta)

    def apply_spectral(self, gamma: float, direction: Array) -> None:
        """No momentum: v ← Π(v − η(λv + γD))."""
        v = self.variable.value
        self.place(v - self.settings.lr * (self.weight_decay * v + gamma * direction))

    def place(self, value: Array) -> None:
        self.variable.value = np.minimum(
            np.maximum(value, self.variable.lower), self.variable.upper
        )


def rms(x: Array) -> float:
    return math.sqrt(math.fsum(value * value for value in x.flat) / x.size)


def normalised(x: Array) -> Array:
    """Of root mean square 1; zeros stay."""
    return x / rms(x) if x.any() else x


POLAR = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)


def polar(matrix: Array) -> Array:
    """Four times X ← aX + (bA + cA²)X with A = XXᵀ, from X = G/‖G‖."""
    x = matrix / math.sqrt(math.fsum(value * value for value in matrix.flat) or 1.0)
    for a, b, c in POLAR:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def steepest(g: Array, layout: str, present: Array) -> Array:
    """√max(rows, columns) · polar of a matrix; vectors, rows and numbers over their rms."""
    if g.ndim < 2:
        return normalised(g)
    if layout == "rows":
        rows = [normalised(row) if p.any() else 0 * row for row, p in zip(g, present, strict=True)]
        return np.stack(rows)
    if layout == "stack" and g.ndim > 2:
        return np.stack([steepest(part, layout, part) for part in g])
    matrix = g.reshape(g.shape[0], -1)
    return (math.sqrt(max(matrix.shape)) * polar(matrix)).reshape(g.shape)


def size_of(weights: Array) -> float:
    """ρ: rms of a matrix, at least a tenth of the usual; 0.1 max(1, rms) of a vector."""
    if weights.ndim < 2:
        return 0.1 * max(1.0, rms(weights))
    return max(rms(weights), 0.1 / math.sqrt(weights[0].size))


class FloatParameter:
    """A parameter that moves itself: M = 1, in a box if it has a radius."""

    def __init__(self, weights: Array, settings: Settings) -> None:
        self.settings, bound = settings, settings.bound
        start = np.clip(np.array(weights, dtype=np.float64), -bound, bound)
        self.weights = Variable(start, size_of(start), -bound, bound)

    def forward(self) -> Array:
        return self.weights.value

    def moves(self, gradient: Array) -> list[Move]:
        return [Move(self.weights, gradient, 1.0, self.settings)]

    def finish(self) -> None:
        """No unit that could change."""


class LatentParameter:
    """w = c·u, c = max|w| (at least 1/√n where the box bounds the levels), u in [−R, R]."""

    leveled = True

    def __init__(self, weights: Array, settings: Settings) -> None:
        self.settings = settings
        weights = np.array(weights, dtype=np.float64)
        self.channels = channels_of(weights.shape, settings)
        self.n = len(self.channels[0])
        self.unit, usual = float(np.abs(weights).max()), 1 / math.sqrt(self.n)
        if self.leveled:
            self.unit = max(self.unit, usual)
        elif self.unit < 1e-15:
            self.unit = usual
        bound = settings.bound
        u = np.clip(weights / self.unit, -bound, bound)
        self.latent = Variable(u, 0.5 * min(1.0, bound), -bound, bound)
        self.start_scales()
        self.finish()

    def start_scales(self) -> None:
        """None to start, but for ternary weights."""

    def finish(self) -> None:
        """Where mean|u| > ¾R the unit is doubled; c·u, its momentum and its steps stay."""
        latent = self.latent
        if not self.leveled or np.abs(latent.value).mean() <= 0.75 * self.settings.bound:
            return
        self.unit *= 2
        latent.value = latent.value / 2
        latent.momentum = latent.momentum / 2
        latent.size /= 2
        latent.mean = latent.mean * 2

    def of_channels(self, statistic: Callable[[list[float]], float]) -> Array:
        """A number of each channel's |u|, at each of its weights."""
        result = np.empty_like(self.latent.value)
        for channel in self.channels:
            number = statistic([abs(float(self.latent.value[index])) for index in channel])
            for index in channel:
                result[index] = number
        return result

    def forward(self) -> Array:
        theta, c = self.settings.relaxation, self.unit
        return (1 - theta) * self.hard() + theta * c * self.latent.value

    def moves(self, gradient: Array) -> list[Move]:
        """δ_θ = (1 − θ)δ + θcg,  M_θ = ((1 − θ)√M + θc)²;  a scale has (1 − θ) times its δ."""
        theta, c = self.settings.relaxation, self.unit
        hard, *scales = self.hard_moves(gradient)
        delta = (1 - theta) * hard.delta + theta * c * gradient
        metric = ((1 - theta) * math.sqrt(hard.metric) + theta * c) ** 2
        return [
            Move(self.latent, delta, metric, self.settings),
            *(Move(s.variable, (1 - theta) * s.delta, s.metric, s.settings) for s in scales),
        ]

    def hard(self) -> Array:
        raise NotImplementedError

    def hard_moves(self, gradient: Array) -> list[Move]:
        raise NotImplementedError


def channels_of(shape: tuple[int, ...], settings: Settings) -> list[list[tuple[int, ...]]]:
    """The indices of each output channel: alike in the group and along the scale's axes."""
    axis = settings.scale_axis
    axes = (axis,) if isinstance(axis, int) else axis
    inputs = shape[0] // settings.scale_groups
    channels: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in np.ndindex(*shape):
        key = (index[0] // inputs if settings.scale_groups > 1 else 0, *(index[d] for d in axes))
        channels.setdefault(key, []).append(index)
    return list(channels.values())


class BinaryParameter(LatentParameter):
    """Q = c·a·sign(u), a = mean|u| of the output channel, sign(0) = +1."""

    def hard(self) -> Array:
        return self.unit * self.of_channels(fmean) * np.where(self.latent.value >= 0, 1.0, -1.0)

    def hard_moves(self, gradient: Array) -> list[Move]:
        """δ_i = c(a + 1/n) g_i,  M = c² mean((a + 1/n)(a + 1))."""
        c, n, a = self.unit, self.n, self.of_channels(fmean)
        metric = c * c * float(np.mean((a + 1 / n) * (a + 1)))
        return [Move(self.latent, c * (a + 1 / n) * gradient, metric, self.settings)]


class UniformParameter(LatentParameter):
    """Q = c·a·round(q·u/a)/q, a = max|u| of the output channel, q = 2^(bits − 1) − 1."""

    def hard(self) -> Array:
        q: int = 2 ** ((self.settings.bits or 4) - 1) - 1
        a = self.of_channels(max)
        return self.unit * a * np.round(q * self.latent.value / np.where(a > 0, a, 1.0)) / q

    def hard_moves(self, gradient: Array) -> list[Move]:
        """δ = c·g,  M = c²."""
        c = self.unit
        return [Move(self.latent, c * gradient, c * c, self.settings)]


class TernaryParameter(LatentParameter):
    """Q = c·W_p above Δ, −c·W_n below −Δ, 0 between; Δ = t·max|u| or 0.7·mean|u|."""

    leveled = False

    def start_scales(self) -> None:
        """The mean of |u| beyond Δ; ρ = 0.1 · max(W₀, 0.1/(c√n)), n the size of a first index."""
        least = 0.1 / (self.unit * math.sqrt(self.latent.value[0].size))
        scales = []
        for zone in self.zones():
            beyond = [float(u) for u in np.abs(self.latent.value[zone])]
            start = max(fmean(beyond) if beyond else 0.0, SCALE_MIN)
            size = 0.1 * max(start, least)
            scales.append(Variable(np.array(start), size, lower=SCALE_MIN, decays=False))
        self.scale_pos, self.scale_neg = scales

    def zones(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        u = self.latent.value
        t, size = self.settings.threshold, np.abs(u)
        if t is None and self.settings.norm == "euclidean":
            t = 0.05
        threshold = 0.7 * size.mean() if t is None else t * size.max()
        return u > threshold, u < -threshold

    def hard(self) -> Array:
        above, below = self.zones()
        result = np.zeros_like(self.latent.value)
        result[above] = self.unit * self.scale_pos.value
        result[below] = -self.unit * self.scale_neg.value
        return result

    def hard_moves(self, gradient: Array) -> list[Move]:
        """δ_u = c·(W_p g, s g, W_n g), δ_Wp = c Σ₊g, δ_Wn = −c Σ₋g.

        M = c²(n₊W_p² + n₀s² + n₋W_n²)/n, c²n₊, c²n₋; s is 1 in the paper, else (W_p + W_n)/2.
        """
        c = self.unit
        above, below = self.zones()
        W_p, W_n = float(self.scale_pos.value), float(self.scale_neg.value)
        s = 1.0 if self.settings.norm == "euclidean" else (W_p + W_n) / 2
        slopes = np.where(above, W_p, np.where(below, W_n, s))
        metric = c * c * float(np.square(slopes).mean())
        pos, neg = np.array(c * gradient[above].sum()), np.array(-c * gradient[below].sum())
        return [
            Move(self.latent, c * slopes * gradient, metric, self.settings),
            Move(self.scale_pos, pos, c * c * max(int(above.sum()), 1), self.settings),
            Move(self.scale_neg, neg, c * c * max(int(below.sum()), 1), self.settings),
        ]


Parameter = FloatParameter | LatentParameter


def make_parameter(weights: Array, settings: Settings) -> Parameter:
    kinds: dict[str | None, type[FloatParameter] | type[LatentParameter]] = {
        None: FloatParameter,
        "binary": BinaryParameter,
        "ternary": TernaryParameter,
        "uniform": UniformParameter,
    }
    return kinds[settings.quantizer](weights, settings)


@dataclass
class Optimizer:
    """Parameters that are stepped together, the height of their plane, and the steps so far."""

    parameters: Sequence[Parameter]
    height: float | None = None
    steps: int = 0

    def step(self, loss: float, gradients: Sequence[Array | None]) -> float:
        """One step of all parameters with a gradient, one γ for all. Returns γ."""
        pairs = [
            (parameter, gradient)
            for parameter, gradient in zip(self.parameters, gradients, strict=True)
            if gradient is not None
        ]
        moves = [move for parameter, gradient in pairs for move in parameter.moves(gradient)]
        settings = self.parameters[0].settings
        step = self.spectral if settings.norm == "spectral" else self.euclidean
        gamma = step(loss, moves, settings.eps)
        for parameter, _ in pairs:
            parameter.finish()
        return gamma

    def euclidean(self, loss: float, moves: Sequence[Move], eps: float) -> float:
        elements = [element for move in moves for element in move.elements()]
        free = all(math.isinf(e.lower) and math.isinf(e.upper) for e in elements)
        gamma = float((closed_form_gamma if free else exact_gamma)(loss, eps, elements))
        for move in moves:
            move.apply(gamma)
        return gamma

    def spectral(self, loss: float, moves: Sequence[Move], eps: float) -> float:
        """With h ← μ·h_left + (1 − μ)ℓ, at first ℓ: γ = clip[0,1]((h − decay) / (full + ε)), and
        D / √(1 + t/100) for D in the step after t others.
        """
        mu, first = moves[0].settings.momentum, self.height is None
        h = loss if self.height is None else mu * self.height + (1 - mu) * loss
        falls = 1 / math.sqrt(1 + self.steps / 100)
        directions = [falls * move.average(first) for move in moves]
        decay = full = 0.0
        for move, D in zip(moves, directions, strict=True):
            lr, m, v = move.settings.lr, move.variable.mean, move.variable.value
            decay += math.fsum((lr * m * move.weight_decay * v).flat)
            full += math.fsum((lr * m * D).flat)
        gamma = min(max((h - decay) / (full + eps), 0.0), 1.0) if full + eps else 1.0
        for move, D in zip(moves, directions, strict=True):
            move.apply_spectral(gamma, D)
        self.steps += 1
        self.height = max(0.0, h - decay - gamma * full)
        return gamma

"""Every optimizer, quantizer and norm, step by step, against the transcription in reference.py.

Each case trains layers of all kinds at once: of one shape (a batch), tall, wide, convolutions,
transposed ones with groups, stacks of matrices, tables of rows, vectors and single numbers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers import assert_consistent, to_numpy
from kinds import BOTH_NORMS, FLOAT_GROUP, NORMS
from reference import Array, FloatParameter, Settings
from torch import Tensor
from torch.nn import Parameter

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

STEPS = 20

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "float": (DFW, {}),
    "box": (ProjectedDFW, {"quantizer": None, "radius": 0.3}),
    "binary": (ProjectedDFW, {"quantizer": "binary", "radius": 1.0}),
    "uniform": (ProjectedDFW, {"quantizer": "uniform", "bits": 3, "radius": 1.0}),
    "ternary": (TernaryDFW, {"quantizer": "ternary", "threshold": None, "radius": 1.0}),
}


@dataclass(frozen=True)
class Case:
    quantizer: str
    norm: str
    relaxation: float
    weight_decay: float
    momentum: float
    lr: float

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in vars(self).items())

    def groups(self) -> list[tuple[list[tuple[int, ...]], dict[str, Any]]]:
        """Shapes, and settings that differ from the optimizer's."""
        own = CLASSES[self.quantizer][1]
        quantized = self.quantizer in ("binary", "uniform", "ternary")
        free = FLOAT_GROUP if self.quantizer != "float" else {}
        closed: dict[str, Any] = {"step_size": "closed_form"} if own else {}
        stack = {"scale_axis": (0, 1)} if quantized else {}
        # One group has another lr, decay and, where each may have its own, momentum.
        other = {"lr": 0.5 * self.lr, "weight_decay": 0.3 * self.weight_decay}
        if self.norm == "euclidean":
            other["momentum"] = 0.5 * self.momentum
        groups: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = [
            ([(3, 4), (3, 4), (5, 2), (2, 2, 2, 2)], own),
            ([(3, 4), (1, 1)], {**own, **closed, **other}),
            ([(2, 3, 4)], {**own, "layout": "stack", **stack}),
            ([(5, 2)], {**own, **({"radius": 0.6} if own else {})}),
            ([(5,), (1,), (), (2, 3)], free),
            ([(4, 3)], {**free, "layout": "rows"}),
        ]
        if quantized:
            groups.append(([(4, 3, 2)], {**own, "scale_axis": 1, "scale_groups": 2}))
            groups.append(([(3, 4)], {**own, "radius": None}))
        return groups

    def start(self, dtype: torch.dtype, **options: Any) -> tuple[Any, list[Parameter], Any]:
        """The optimizer, its parameters in order, and their transcription."""
        generator = np.random.default_rng(0)
        fields = ("norm", "weight_decay", "momentum", "lr")
        common = {name: getattr(self, name) for name in fields} | options
        if self.relaxation:
            common["relaxation"] = self.relaxation
        groups, params, expected = [], [], []
        for shapes, own in self.groups():
            weights = [torch.tensor(generator.normal(0, 0.3, s)).to(dtype) for s in shapes]
            members = [Parameter(w) for w in weights]
            groups.append({"params": members, **own})
            params += members
            expected += [
                reference.make_parameter(to_numpy(w), Settings(**{**common, **own}))
                for w in weights
            ]
        optimizer = CLASSES[self.quantizer][0](groups, **common)
        return optimizer, params, reference.Optimizer(expected)


def cases() -> Iterator[Case]:
    """Of the four settings of quantized weights every three values meet, in half of all cases."""
    choices = ((0.0, 0.3), (0.0, 0.1), (0.0, 0.9), (0.1, 3.0))
    for quantizer, norm in itertools.product(CLASSES, NORMS):
        for second in itertools.product(range(2), repeat=4):
            float_weights = quantizer in ("float", "box")
            if second[0] == 0 if float_weights else sum(second) % 2 == 0:
                chosen = (values[i] for values, i in zip(choices, second, strict=True))
                yield Case(quantizer, norm, *chosen)


CASES = [*cases()]


def walk(
    parameters: list[reference.Parameter], dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[float, list[Array | None]]]:
    """Losses and gradients of a noisy regression to random targets: they depend on the weights.

    The size of the loss swings, so that γ is 0, between 0 and 1, and 1; now and then a parameter
    has no gradient, or a row of it none.
    """
    generator = np.random.default_rng(seed)
    for number in range(STEPS):
        gradients: list[Array | None] = []
        loss = 0.0
        for index, parameter in enumerate(parameters):
            weights = parameter.forward()
            target = generator.normal(0, 1, weights.shape)
            gradient = np.asarray(weights - target, dtype=np.float64)
            loss += 0.5 * float(np.square(gradient).sum())
            if parameter.settings.layout == "rows":
                gradient[number % 4] = 0.0
            # As the optimizer will see it, so that rounding makes no difference to the input.
            gradient = to_numpy(torch.tensor(gradient).to(dtype))
            gradients.append(None if (number + index) % 7 == 6 else gradient)
        factor = float(generator.choice([0.0, 1e-3, 0.02, 0.1, 1.0]))
        yield float(torch.tensor(loss * factor, dtype=dtype)), gradients


def pairs_of_state(
    optimizer: Any, p: Tensor, expected: reference.Parameter
) -> Iterator[tuple[str, Tensor, Array | float]]:
    """All that is kept for a parameter, beside what the transcription has for it."""
    state = optimizer.state[p]
    yield "parameter", p, expected.forward()
    if isinstance(expected, FloatParameter):
        variables = {"": expected.weights}
    else:
        yield "unit", state["unit"], expected.unit
        yield "latent", state["latent"], expected.latent.value
        variables = {"": expected.latent}
    if isinstance(expected, reference.TernaryParameter):
        variables |= {"scale_pos_": expected.scale_pos, "scale_neg_": expected.scale_neg}
        yield "scale_pos", state["scale_pos"], expected.scale_pos.value
        yield "scale_neg", state["scale_neg"], expected.scale_neg.value
    for prefix, variable in variables.items():
        if expected.settings.norm == "spectral":
            yield f"{prefix}mean", state[f"{prefix}mean_gradient"], variable.mean
            yield f"{prefix}size", state[f"{prefix}size"], variable.size
        elif expected.settings.momentum:
            yield f"{prefix}momentum", state[f"{prefix}momentum_buffer"], variable.momentum
    if expected.settings.norm == "euclidean" and not expected.settings.momentum:
        assert not any("momentum" in key for key in state)


def run(case: Case, dtype: torch.dtype, rtol: float, atol: float, **options: Any) -> list[float]:
    """All numbers after every step; returns γ of each."""
    optimizer, params, expected = case.start(dtype, **options)

    def compare(number: int) -> None:
        for p, e in zip(params, expected.parameters, strict=True):
            for name, actual, value in pairs_of_state(optimizer, p, e):
                value = np.asarray(value)
                within = np.abs(to_numpy(actual) - value) <= atol + rtol * np.abs(value)
                assert within.all(), f"step {number}, {name} of {tuple(p.shape)}: {actual}, {value}"

    compare(0)
    gammas = []
    for number, (loss, gradients) in enumerate(walk(expected.parameters, dtype), 1):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = None if gradient is None else torch.tensor(gradient).to(dtype)
        gamma = expected.step(loss, gradients)
        # The loss as a tensor and as a number: both are allowed.
        optimizer.step(loss=torch.tensor(loss, dtype=dtype) if number % 2 else loss)
        gammas.append(gamma)
        assert float(optimizer.gamma) == pytest.approx(gamma, rel=rtol, abs=atol), number
        compare(number)
    if case.norm == "spectral":
        plane = optimizer.state_dict()["state"][0]["plane"].tolist()
        assert plane == pytest.approx([expected.height, expected.steps], rel=rtol, abs=1e-9)
    assert_consistent(optimizer)
    assert any(0.0 < gamma < 1.0 for gamma in gammas)
    return gammas


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory(case: Case) -> None:
    """Rounding alone: 1e-16 a step, which orthogonal factors multiply by up to 10⁴, and which moves
    the levels, and so the next gradients, of latents that no box holds.
    """
    run(case, torch.float64, 1e-9, 1e-10)


@BOTH_NORMS
@pytest.mark.parametrize("quantizer", CLASSES)
def test_float32(quantizer: str, norm: str) -> None:
    """From the same rounded input. Rounding: 6e-8 a step, times as much as above."""
    run(Case(quantizer, norm, 0.0, 0.1, 0.9, 0.1), torch.float32, 1e-3, 1e-4)


@BOTH_NORMS
@pytest.mark.parametrize("quantizer", CLASSES)
def test_large_eps(quantizer: str, norm: str) -> None:
    gammas = [
        run(Case(quantizer, norm, 0.0, 0.1, 0.9, 0.1), torch.float64, 1e-9, 1e-10, eps=eps)
        for eps in (1e-5, 30.0)
    ]
    assert sum(gammas[1]) < 0.9 * sum(gammas[0])


def test_euclidean_by_hand() -> None:
    """Numbers small enough to check on paper: two steps."""
    p = Parameter(torch.tensor([1.0, -2.0]))
    optimizer: Any = DFW([p], lr=0.1, momentum=0.5, weight_decay=0.2, eps=0.0, norm="euclidean")
    p.grad = torch.tensor([3.0, 1.0])
    optimizer.step(loss=0.5)
    # r = (0.2, −0.4); γ = (0.5 − 0.1·(0.6 − 0.4)) / (0.1·10) = 0.48
    # z = −0.1·0.48·(3.2, 0.6) = (−0.1536, −0.0288)
    # w = (1, −2) − 0.1·((0.2, −0.4) + 0.48·(3, 1)) + 0.5·z
    assert float(optimizer.gamma) == pytest.approx(0.48)
    assert p.tolist() == pytest.approx(
        [1 - 0.1 * (0.2 + 1.44) - 0.0768, -2 - 0.1 * (-0.4 + 0.48) - 0.0144]
    )
    w, z = p.tolist(), [-0.1536, -0.0288]
    p.grad = torch.tensor([0.0, 10.0])
    optimizer.step(loss=100.0)
    assert float(optimizer.gamma) == 1.0
    z = [0.5 * z[0] - 0.1 * 0.2 * w[0], 0.5 * z[1] - 0.1 * (10 + 0.2 * w[1])]
    assert p.tolist() == pytest.approx(
        [w[0] - 0.1 * 0.2 * w[0] + 0.5 * z[0], w[1] - 0.1 * (0.2 * w[1] + 10) + 0.5 * z[1]]
    )


def test_spectral_by_hand() -> None:
    """The plane is the mean of two batches' planes; what the first step left of it is carried."""
    p = Parameter(torch.tensor([1.0, -1.0]))  # ρ = 0.1 max(1, 1)
    optimizer: Any = DFW([p], lr=1.0, momentum=0.5, eps=0.0)
    p.grad = torch.tensor([3.0, 1.0])
    optimizer.step(loss=0.2)
    # m = g = (3, 1), rms √5; D = 0.1·(3, 1)/√5; γ = 0.2·√5 / (0.1·10) = √5/5; γD = 0.02·(3, 1)
    assert float(optimizer.gamma) == pytest.approx(5**-0.5)
    assert p.tolist() == pytest.approx([0.94, -1.02])
    p.grad = torch.tensor([0.0, 2.0])
    optimizer.step(loss=1.0)
    # Nothing was left: h = ½(0 + 1). m = ½((3, 1) + (0, 2)) = (1.5, 1.5), g = ½(m + (0, 2)) =
    # (0.75, 1.75), rms √1.8125; ⟨m, D⟩ = 0.1·3.75/√1.8125/√1.01 = 0.2772 < h
    assert float(optimizer.gamma) == 1.0
    unit = 0.1 / 1.8125**0.5 / 1.01**0.5
    assert p.tolist() == pytest.approx([0.94 - 0.75 * unit, -1.02 - 1.75 * unit])
    state = optimizer.state_dict()["state"][0]
    assert state["plane"].tolist() == pytest.approx([0.5 - 3.75 * unit, 2])

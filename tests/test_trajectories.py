"""A hundred steps of each optimizer against the literal transcription in reference.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers import PATHS, to_numpy
from reference import Array, FloatParameter, Settings
from torch import Tensor
from torch.nn import Parameter

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

STEPS = 100


@dataclass
class Setup:
    """An optimizer and, for each of its groups, the shapes and the settings."""

    optimizer: Any
    groups: list[tuple[list[tuple[int, ...]], dict[str, Any]]]


def float_group(**settings: Any) -> dict[str, Any]:
    return {"quantizer": None, "radius": None, **settings}


def binary_group(**settings: Any) -> dict[str, Any]:
    return {"quantizer": "binary", "radius": 1.0, **settings}


def ternary_group(**settings: Any) -> dict[str, Any]:
    return {"quantizer": "ternary", "radius": 1.0, **settings}


SETUPS = {
    "dfw": Setup(
        DFW,
        [
            ([(3, 4), (5,)], {"lr": 0.1, "weight_decay": 1e-2}),
            ([(2, 2, 3)], {"lr": 0.03, "momentum": 0.5}),
            ([(1,)], {"lr": 0.3, "momentum": 0.0, "weight_decay": 0.5}),
        ],
    ),
    "box": Setup(
        ProjectedDFW,
        [
            ([(3, 4), (5,)], {"quantizer": None, "radius": 0.3, "weight_decay": 1e-2}),
            ([(2, 3)], {"quantizer": None, "radius": 1.5, "lr": 0.3, "momentum": 0.5}),
            ([(4,)], float_group(lr=0.03, momentum=0.0)),
        ],
    ),
    "binary": Setup(
        ProjectedDFW,
        [
            ([(3, 4), (2, 2, 2, 2)], binary_group(lr=0.1)),
            ([(2, 6)], binary_group(lr=0.5, momentum=0.5, weight_decay=0.1, radius=0.5)),
            ([(1, 1)], binary_group(lr=0.03, momentum=0.0)),
            ([(2, 3)], binary_group(lr=0.3, radius=None)),
            ([(5,)], float_group(lr=0.2, weight_decay=1e-2)),
        ],
    ),
    "binary, closed form": Setup(
        ProjectedDFW,
        [
            ([(3, 4)], binary_group(step_size="closed_form", weight_decay=0.1)),
            ([(2, 6)], binary_group(step_size="closed_form", lr=0.5, momentum=0.5)),
            ([(5,)], float_group(step_size="closed_form", weight_decay=1e-2)),
        ],
    ),
    "binary, some groups closed form": Setup(
        ProjectedDFW,
        [
            ([(3, 4)], binary_group(step_size="closed_form", weight_decay=0.1)),
            ([(2, 6)], binary_group(step_size="exact", lr=0.5, momentum=0.5)),
            ([(5,)], float_group()),
        ],
    ),
    "ternary": Setup(
        TernaryDFW,
        [
            ([(3, 4), (2, 2, 2, 2)], ternary_group(lr=0.1)),
            ([(2, 7)], ternary_group(lr=0.5, momentum=0.5, weight_decay=0.1, threshold=0.3)),
            ([(2, 3)], ternary_group(lr=0.03, momentum=0.0, threshold=0.0, radius=0.7)),
            ([(5,)], float_group(lr=0.2, weight_decay=1e-2)),
        ],
    ),
    "ternary, closed form": Setup(
        TernaryDFW,
        [
            ([(3, 4)], ternary_group(step_size="closed_form", weight_decay=0.1)),
            ([(5,)], float_group(step_size="closed_form")),
        ],
    ),
    "eps": Setup(DFW, [([(3, 4)], {"eps": 0.7}), ([(5,)], {"eps": 0.7, "weight_decay": 1e-2})]),
    "eps, exact search": Setup(ProjectedDFW, [([(3, 4), (2, 5)], binary_group(eps=0.7))]),
}
CASES = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())


def start(setup: Setup, dtype: torch.dtype) -> tuple[Any, list[Parameter], list[Settings]]:
    """The optimizer, its parameters in order, and the settings of each parameter."""
    generator = np.random.default_rng(0)
    groups: list[dict[str, Any]] = []
    params, settings = [], []
    for shapes, options in setup.groups:
        members = [Parameter(torch.tensor(generator.normal(0, 0.3, s)).to(dtype)) for s in shapes]
        groups.append({"params": members, **options})
        params += members
        settings += [Settings(**options) for _ in members]
    return groups, params, settings


def walk(
    params: list[reference.Parameter], seed: int = 0
) -> Iterator[tuple[int, float, list[Array | None]]]:
    """Losses and gradients of a noisy regression to random targets: they depend on the weights.

    The size of the loss swings, so that γ is 0, between 0 and 1, and 1; now and then a parameter
    has no gradient.
    """
    generator = np.random.default_rng(seed)
    for number in range(STEPS):
        gradients: list[Array | None] = []
        loss = 0.0
        for index, parameter in enumerate(params):
            weights = parameter.forward()
            target = generator.normal(0, 1, weights.shape)
            gradients.append(None if (number + index) % 7 == 6 else weights - target)
            loss += 0.5 * float(((weights - target) ** 2).sum())
        yield number, loss * float(generator.choice([0.0, 1e-3, 0.02, 0.1, 1.0])), gradients


def assert_state(
    optimizer: Any, p: Tensor, expected: reference.Parameter, tolerance: dict[str, Any]
) -> None:
    def close(actual: Tensor, value: Array | float) -> None:
        torch.testing.assert_close(
            torch.tensor(to_numpy(actual)), torch.as_tensor(value, dtype=torch.float64), **tolerance
        )

    state = optimizer.state[p]
    close(p, expected.forward())
    if isinstance(expected, reference.FloatParameter):
        momenta = {"momentum_buffer": expected.weights}
    else:
        close(state["unit"], expected.unit)
        close(state["latent"], expected.latent.value)
        momenta = {"momentum_buffer": expected.latent}
    if isinstance(expected, reference.TernaryParameter):
        close(state["scale_pos"], expected.scale_pos.value)
        close(state["scale_neg"], expected.scale_neg.value)
        momenta["scale_pos_momentum_buffer"] = expected.scale_pos
        momenta["scale_neg_momentum_buffer"] = expected.scale_neg
    for name, variable in momenta.items():
        if expected.settings.momentum:
            close(state[name], variable.momentum)
        else:
            assert name not in state


@CASES
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, {"rtol": 1e-10, "atol": 1e-11}, id="float64"),
        pytest.param(torch.float32, {"rtol": 1e-3, "atol": 1e-3}, id="float32"),
    ],
)
def test_trajectory(setup: Setup, path: str, dtype: torch.dtype, tolerance: dict[str, Any]) -> None:
    groups, params, settings = start(setup, dtype)
    expected = [
        reference.make_parameter(to_numpy(p), s) for p, s in zip(params, settings, strict=True)
    ]
    optimizer = setup.optimizer(groups, **PATHS[path])
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), torch.tensor(e.forward()).to(dtype))
    gammas = []
    for number, loss, gradients in walk(expected):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = None if gradient is None else torch.tensor(gradient).to(dtype)
        gamma = reference.step(expected, loss, gradients)
        # The loss as a tensor and as a number: both are allowed.
        optimizer.step(loss=torch.tensor(loss, dtype=dtype) if number % 2 else loss)
        gammas.append(gamma)
        assert float(optimizer.gamma) == pytest.approx(
            gamma, rel=tolerance["rtol"], abs=tolerance["atol"]
        ), f"step {number}"
        if dtype == torch.float64:
            for p, e in zip(params, expected, strict=True):
                assert_state(optimizer, p, e, tolerance)
    for p, e in zip(params, expected, strict=True):
        assert_state(optimizer, p, e, tolerance)

    # The run has seen what it should: both ends, the inside, and bounds that bind.
    assert sum(gamma == 0.0 for gamma in gammas) >= 5
    assert sum(0.01 < gamma < 0.99 for gamma in gammas) >= 10
    if "eps" not in settings[0].__dict__ or settings[0].eps < 0.1:
        assert sum(gamma == 1.0 for gamma in gammas) >= 5


@pytest.mark.parametrize("name", ["box", "binary", "ternary"])
def test_bounds_bind(name: str) -> None:
    """The trajectories above test the projection only if it does something in them."""
    _, params, settings = start(SETUPS[name], torch.float64)
    expected = [
        reference.make_parameter(to_numpy(p), s) for p, s in zip(params, settings, strict=True)
    ]
    at_bound = differs = 0
    for _, loss, gradients in walk(expected):
        moves = [
            move
            for parameter, gradient in zip(expected, gradients, strict=True)
            if gradient is not None
            for move in parameter.moves(gradient)
        ]
        elements = [element for move in moves for element in move.elements()]
        gamma = reference.step(expected, loss, gradients)
        differs += abs(gamma - reference.closed_form_gamma(loss, 1e-5, elements)) > 1e-6
        for move in moves:
            value = move.variable.value
            at_bound += int(((value == move.variable.lower) | (value == move.variable.upper)).sum())
    assert at_bound >= 50
    assert differs >= 5


def test_one_step_by_hand() -> None:
    """Numbers small enough to check on paper: two steps of DFW."""
    p = Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer: Any = DFW([p], lr=0.1, momentum=0.5, weight_decay=0.2, eps=0.0)
    p.grad = torch.tensor([3.0, 1.0], dtype=torch.float64)
    optimizer.step(loss=0.5)
    # r = (0.2, −0.4); γ = (0.5 − 0.1·(0.6 − 0.4)) / (0.1·10) = 0.48
    # z = −0.1·0.48·(3.2, 0.6) = (−0.1536, −0.0288)
    # w = (1, −2) − 0.1·((0.2, −0.4) + 0.48·(3, 1)) + 0.5·z
    assert float(optimizer.gamma) == pytest.approx(0.48)
    assert p.tolist() == pytest.approx(
        [1 - 0.1 * (0.2 + 1.44) - 0.0768, -2 - 0.1 * (-0.4 + 0.48) - 0.0144]
    )
    w, z = p.tolist(), [-0.1536, -0.0288]
    p.grad = torch.tensor([0.0, 10.0], dtype=torch.float64)
    optimizer.step(loss=100.0)
    assert float(optimizer.gamma) == 1.0
    z = [0.5 * z[0] - 0.1 * 0.2 * w[0], 0.5 * z[1] - 0.1 * (10 + 0.2 * w[1])]
    assert p.tolist() == pytest.approx(
        [w[0] - 0.1 * 0.2 * w[0] + 0.5 * z[0], w[1] - 0.1 * (0.2 * w[1] + 10) + 0.5 * z[1]]
    )


def test_momentum_is_counted_before_the_projection() -> None:
    """The step ends with one projection: momentum carries a weight to the bound, not past it."""
    p = Parameter(torch.tensor([0.9, 0.9], dtype=torch.float64))
    optimizer = ProjectedDFW(
        [p], lr=1.0, momentum=0.9, eps=0.0, quantizer=None, radius=1.0, step_size="closed_form"
    )
    p.grad = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    optimizer.step(loss=0.1)
    # γ = 0.1 / 2 = 0.05; w − ηγd = (0.95, 0.85); μz = (0.045, −0.045)
    assert p.tolist() == pytest.approx([0.995, 0.805])
    optimizer.step(loss=0.1)
    # z = 0.9 (0.05, −0.05) + (0.05, −0.05) = ±0.095: (0.995 + 0.05 + 0.0855, 0.805 − 0.05 − 0.0855)
    assert p.tolist() == pytest.approx([1.0, 0.6695])
    # z is not cut by the bound: it is the same as without one.
    assert optimizer.state[p]["momentum_buffer"].tolist() == pytest.approx([0.095, -0.095])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quantizer", [None, "binary"])
@pytest.mark.parametrize("reach", [0.0, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_outside_the_box(
    dtype: torch.dtype, reach: float, quantizer: str | None, path: str
) -> None:
    """A radius made smaller in mid-training; decay by η λ = reach on top of it.

    There γ may lie on either side of the closed form, whatever end that is at.
    """
    check_single_steps(dtype, quantizer, reach, (2.0, 0.5), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quantizer", [None, "binary"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decay_carries_out_of_the_box(dtype: torch.dtype, quantizer: str | None, path: str) -> None:
    """Every weight starts inside, and η λ = 3 puts it outside on the other side, at γ = 0."""
    check_single_steps(dtype, quantizer, 3.0, (1.0, 1.0), path)


def check_single_steps(
    dtype: torch.dtype,
    quantizer: str | None,
    reach: float,
    radii: tuple[float, float],
    path: str,
) -> None:
    """One step from each of many places, with the second radius, beside the transcription."""
    lr, gammas = 0.5, set()
    before, radius = radii
    for seed in range(60):
        generator = np.random.default_rng(seed)
        start = torch.tensor(generator.uniform(-before, before, (2, 3))).to(dtype)
        gradient = torch.tensor(generator.normal(0, 2, (2, 3))).to(dtype)
        loss = float(generator.choice([0.0, 0.1, 1.0, 3.0]))
        options: dict[str, Any] = {
            "lr": lr,
            "weight_decay": reach / lr,
            "quantizer": quantizer,
            "radius": before,
            "momentum": 0.0,
        }
        expected = reference.make_parameter(start.double().numpy(), Settings(**options))
        variable = expected.weights if isinstance(expected, FloatParameter) else expected.latent
        variable.lower, variable.upper = -radius, radius
        p = Parameter(start.clone())
        optimizer = ProjectedDFW([p], **options, **PATHS[path])
        optimizer.param_groups[0]["radius"] = radius
        p.grad = gradient.clone()
        gamma = reference.step([expected], loss, [gradient.double().numpy()])
        optimizer.step(loss=loss)
        rel, least = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-6)
        assert float(optimizer.gamma) == pytest.approx(gamma, rel=rel, abs=least)
        after = torch.tensor(expected.forward()).to(dtype)
        torch.testing.assert_close(p.detach(), after, rtol=10 * rel, atol=10 * least)
        gammas.add(0.0 if gamma == 0 else 1.0 if gamma == 1 else 0.5)
    assert gammas == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(("gradient", "loss", "expected"), [(1.0, 0.5, 0.0), (-1.0, 0.0, 1.0)])
def test_end_points_from_outside_the_box(gradient: float, loss: float, expected: float) -> None:
    """Getting into the box changes the linearised loss by more than the step: the ends swap."""
    p = Parameter(torch.tensor([0.5]))
    optimizer = ProjectedDFW([p], lr=0.1, quantizer=None, radius=0.5)
    with torch.no_grad():
        p.fill_(2.0)
    p.grad = torch.tensor([gradient])
    # φ'(γ) = ℓ + d (0.5 − 2), whatever γ; the closed form has φ'(γ) = ℓ − 0.1 γ.
    optimizer.step(loss=loss)
    assert optimizer.gamma is not None
    assert float(optimizer.gamma) == expected
    assert p.item() == 0.5


@pytest.mark.parametrize("path", PATHS)
def test_one_projection_only(path: str) -> None:
    """At the end: a long step past the upper bound that momentum takes back is not cut before."""
    p = Parameter(torch.tensor([-1.0]))
    optimizer = ProjectedDFW([p], lr=1.0, quantizer=None, radius=1.0, **PATHS[path])
    for gradient in (1.0, 1.0, 1.0, -2.2):
        p.grad = torch.tensor([gradient])
        optimizer.step(loss=10.0)
    # z = −1, −1.9, −2.71 at the lower bound; then z = −2.439 + 2.2 = −0.239
    assert p.item() == pytest.approx(-1 + 2.2 - 0.9 * 0.239)


def test_float_parameters_of_a_quantizing_optimizer_are_plain_dfw() -> None:
    """A group with radius=None, quantizer=None."""
    setups: tuple[tuple[Any, dict[str, Any]], ...] = (
        (DFW, {}),
        (ProjectedDFW, float_group()),
        (TernaryDFW, float_group()),
    )
    results = []
    for optimizer_class, options in setups:
        p = Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
        optimizer: Any = optimizer_class([{"params": [p], **options}], lr=0.3, weight_decay=0.1)
        for number in range(10):
            p.grad = torch.cos(p.detach() * number)
            optimizer.step(loss=0.3)
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_frozen_parameters_are_left_alone() -> None:
    """They neither move nor count in γ, and pair no other parameter with the wrong settings."""
    for frozen in range(3):
        params = [
            Parameter(torch.tensor(np.random.default_rng(i).normal(0, 0.3, (2, 3))))
            for i in range(3)
        ]
        params[frozen].requires_grad_(False)
        settings = Settings(quantizer="binary", radius=1.0)
        before = params[frozen].clone()
        alive = [p for i, p in enumerate(params) if i != frozen]
        expected = [reference.make_parameter(to_numpy(p), settings) for p in alive]
        optimizer = ProjectedDFW(params)
        for number in range(10):
            gradients: list[Array | None] = []
            for i, p in enumerate(alive):
                p.grad = torch.tensor(np.random.default_rng(10 * number + i).normal(0, 1, (2, 3)))
                gradients.append(to_numpy(p.grad))
            gamma = reference.step(expected, 0.1, gradients)
            optimizer.step(loss=0.1)
            assert optimizer.gamma is not None
            assert float(optimizer.gamma) == pytest.approx(gamma, rel=1e-10)
        for p, e in zip(alive, expected, strict=True):
            torch.testing.assert_close(p.detach(), torch.tensor(e.forward()))
        assert torch.equal(params[frozen], before)

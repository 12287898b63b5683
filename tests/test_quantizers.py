"""Mirror maps, pull-backs and metrics against loops, autograd and finite differences.

The expected pull-back is autograd's, of a surrogate: Q with an estimate in place of the derivative
of its rounding. The expected metric is the mean squared change of all weights by a unit step of one
number, from the surrogate's Jacobian.
"""

# torch leaves the application of a Function untyped.
# mypy: disable-error-code="no-untyped-call"

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reference import Settings, channels_of, make_parameter
from torch import Tensor

from dfw_opt.quantizers import Quantizer, State, quantizer_of

LAYOUTS: list[tuple[tuple[int, ...], int | tuple[int, ...], int]] = [
    ((1, 1), 0, 1),
    ((1, 5), 0, 1),
    ((3, 4), 0, 1),  # linear
    ((3, 2, 2, 2), 0, 1),  # convolution
    ((3, 4, 2), 1, 1),  # transposed
    ((4, 3, 2), 1, 2),  # transposed, of two groups
    ((6, 2, 2, 1), 1, 3),
    ((2, 3, 4), (0, 1), 1),  # a stack of matrices
    ((2, 3, 4), (0, 2), 1),
]
"""Shape, dimensions of the output channels, groups."""

OPTIONS: dict[str, dict[str, Any]] = {
    "binary": {},
    "uniform": {"bits": 3},
    "ternary": {"threshold": None},
    "ternary-euclidean": {"threshold": 0.3, "norm": "euclidean"},
}
BATCH, UNITS = 3, (0.37, 1.9, 0.02)

CASES = [
    pytest.param(name, *layout, theta, id=f"{name}-{layout}-{theta}")
    for name, layout, theta in itertools.product(OPTIONS, LAYOUTS, (0.0, 0.3, 1.0))
]


def make(
    name: str, axis: int | tuple[int, ...] = 0, groups: int = 1, theta: float = 0.0, **own: Any
) -> Quantizer:
    keys = {"scale_axis": axis, "scale_groups": groups, "relaxation": theta, "norm": "spectral"}
    quantizer = quantizer_of({"quantizer": name.split("-")[0], **keys, **OPTIONS[name], **own})
    assert quantizer is not None
    return quantizer


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[State, Tensor]:
    """A batch of states, latents in the open box, and gradients; scales of every tensor differ."""
    generator = torch.Generator().manual_seed(seed)
    latent = 2 * torch.rand((BATCH, *shape), generator=generator, dtype=torch.float64) - 1
    grad = torch.randn(latent.shape, generator=generator, dtype=torch.float64)
    state, ones = {"latent": latent}, (1,) * len(shape)
    numbers = {"unit": UNITS, "scale_pos": (0.8, 0.5, 1.2), "scale_neg": (0.3, 0.9, 0.6)}
    for key, value in numbers.items():
        state[key] = torch.tensor(value, dtype=torch.float64).view(-1, *ones)
    return state, grad


class Estimate(torch.autograd.Function):
    """A function forward, a slope backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def per_channel(u: Tensor, axis: Any, groups: int, how: Callable[[Tensor], Tensor]) -> Tensor:
    """``how`` of each channel, at each of its weights, by the indices of the transcription."""
    result = torch.zeros_like(u)
    for channel in channels_of(tuple(u.shape), Settings(scale_axis=axis, scale_groups=groups)):
        at = tuple(torch.tensor(index) for index in zip(*channel, strict=True))
        result = result.index_put(at, how(u[at]).expand(len(channel)))
    return result


def surrogate(
    name: str, u: Tensor, c: Tensor, W: tuple[Tensor, Tensor], axis: Any, groups: int
) -> Any:
    """Q of one tensor, as autograd is to see it."""
    fixed = u.detach()
    if name == "binary":  # through the sign, and through the scale
        a = per_channel(u.abs(), axis, groups, torch.mean)
        signs = torch.where(fixed >= 0, 1.0, -1.0).to(u)
        return c * a * Estimate.apply(u, signs, torch.ones_like(u))
    if name == "uniform":  # through the rounding alone
        a, q = per_channel(fixed.abs(), axis, groups, torch.max), 3  # of 3 bits
        x = q * u / a
        return c * a * Estimate.apply(x, x.detach().round(), torch.ones_like(u)) / q
    t, euclidean = OPTIONS[name]["threshold"], "euclidean" in name
    delta = 0.7 * fixed.abs().mean() if t is None else t * fixed.abs().max()
    above, below = fixed > delta, fixed < -delta
    level = W[0] * above - W[1] * below
    between = 1 if euclidean else (W[0] + W[1]) / 2
    slope = W[0] * above + W[1] * below + between * ~(above | below)
    # Forward level; backward to u the slope, to the scales the level itself.
    return c * (level + Estimate.apply(u, torch.zeros_like(u), slope.detach()))


def each(state: State) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Latent, unit and scales of each tensor of a batch, as leaves."""
    for i in range(BATCH):
        u = state["latent"][i].clone().requires_grad_()
        unit, *W = (state[key][i].reshape(()) for key in ("unit", "scale_pos", "scale_neg"))
        pos, neg = (scale.clone().requires_grad_() for scale in W)
        yield u, unit, (pos, neg)


@pytest.mark.parametrize(("name", "shape", "axis", "groups", "theta"), CASES)
def test_against_autograd(
    name: str, shape: tuple[int, ...], axis: Any, groups: int, theta: float
) -> None:
    quantizer = make(name, axis, groups, theta)
    state, grad = draw(shape)
    values, pulled = quantizer.quantize(state), quantizer.pull_back(grad, state)
    assert set(pulled) == {"latent", *quantizer.scales}
    assert quantizer.scales == (("scale_pos", "scale_neg") if "ternary" in name else ())
    for i, (u, c, W) in enumerate(each(state)):

        def hard(u: Tensor, c: Tensor = c, W: tuple[Tensor, Tensor] = W) -> Any:
            return surrogate(name, u, c, W, axis, groups)

        relaxed = (1 - theta) * hard(u) + theta * c * u
        torch.testing.assert_close(values[i], relaxed.detach(), rtol=1e-12, atol=1e-14)
        leaves = (u, *W) if "ternary" in name else (u,)
        jacobian = torch.autograd.functional.jacobian(hard, u).reshape(u.numel(), -1)
        if name == "binary":
            # What a latent does through the scale to others of its channel is left out.
            own = jacobian.diagonal().reshape(shape)
            delta = (1 - theta) * own * grad[i] + theta * c * grad[i]
            # The levels' steps: along the signs, latent and scale move a weight by c(a + 1).
            a = per_channel(u.detach().abs(), axis, groups, torch.mean)
            metric = (own * c * (a + 1)).mean()
            gradients: tuple[Tensor, ...] = (delta,)
        else:
            gradients = torch.autograd.grad((relaxed * grad[i]).sum(), leaves)
            metric = jacobian.square().sum() / u.numel()
        expected = ((1 - theta) * metric.sqrt() + theta * c).square()
        result = pulled["latent"]
        assert result.metric is not None
        assert result.metric.shape == (BATCH, *(1,) * len(shape))
        torch.testing.assert_close(result.gradient[i], gradients[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result.metric[i].reshape(()), expected, rtol=1e-12, atol=0)
        for key, scale, gradient in zip(quantizer.scales, W, gradients[1:], strict=False):
            delta, M = pulled[key]
            assert M is not None
            assert delta.shape == M.shape == (BATCH,)
            torch.testing.assert_close(delta[i], gradient, rtol=1e-12, atol=1e-14)
            # A unit of a scale moves each weight of its zone by c; an empty one counts as one.
            moved = torch.autograd.functional.jacobian(
                lambda w, key=key, W=W, u=u, hard=hard: hard(
                    u.detach(), W=(w, W[1]) if key == "scale_pos" else (W[0], w)
                ),
                scale,
            )
            torch.testing.assert_close(M[i], moved.square().sum().clamp(min=c.item() ** 2))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [1e-20, 1e-10, 0.3, 1e4])
def test_start(name: str, layout: tuple[Any, ...], size: float) -> None:
    """Unit, latents and scales of weights of any size; without a box no unit is doubled later."""
    shape, axis, groups = layout
    weight = torch.tensor(np.random.default_rng(0).normal(0, size, (1, *shape)))
    weight = weight.abs() if axis else weight  # one zone is empty
    state = make(name, axis, groups).start(weight, math.inf)
    own = {"scale_axis": axis, "scale_groups": groups, **OPTIONS[name]}
    expected: Any = make_parameter(weight[0].numpy(), Settings(quantizer=name.split("-")[0], **own))
    assert float(state["unit"]) == pytest.approx(expected.unit, rel=1e-14)
    torch.testing.assert_close(state["latent"][0], torch.tensor(expected.latent.value))
    for key in ("scale_pos", "scale_neg") if "ternary" in name else ():
        assert float(state[key]) == pytest.approx(float(getattr(expected, key).value), rel=1e-12)
    assert (make(name, axis, groups).start(weight, 0.4)["latent"].abs() <= 0.4).all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros(name: str, dtype: torch.dtype) -> None:
    """All zero: a unit of 1/√n, weights and gradients that are finite, so that it can be left."""
    quantizer = make(name)
    state = quantizer.start(torch.zeros(2, 3, 4, dtype=dtype), 1.0)
    torch.testing.assert_close(state["unit"].flatten(), torch.full((2,), 0.5, dtype=dtype))
    state = {key: value.view(2, 1, 1) if key != "latent" else value for key, value in state.items()}
    assert not quantizer.quantize(state).any()
    for delta, metric in quantizer.pull_back(torch.ones(2, 3, 4, dtype=dtype), state).values():
        assert torch.isfinite(delta).all()
        assert metric is not None
        assert (metric > 0).all()
    assert (quantizer.pull_back(torch.ones(2, 3, 4, dtype=dtype), state)["latent"][0] != 0).all()


def quantize(name: str, latent: list[list[float]], **own: Any) -> list[list[float]]:
    numbers = {"unit": 2.0, "scale_pos": 0.75, "scale_neg": 0.25}
    state = {key: torch.full((1, 1, 1), value) for key, value in numbers.items()}
    values = make(name, **own).quantize({**state, "latent": torch.tensor([latent])})
    result: list[list[float]] = values[0].tolist()
    return result


def test_values_of_binary() -> None:
    """One magnitude a channel; the sign of both zeros is +1."""
    assert quantize("binary", [[0.5, -0.25, 0.75, -0.5]]) == [[1.0, -1.0, 1.0, -1.0]]
    assert quantize("binary", [[0.0, -0.0, 0.5, -0.5]]) == [[0.5, 0.5, 0.5, -0.5]]


def test_values_of_ternary() -> None:
    """Δ of the whole tensor; both u > Δ and u < −Δ are strict, and 0.5 is exact."""
    latent = [[1.0, 0.5, -0.5], [0.5000001, -0.5000001, -0.0]]
    assert quantize("ternary", latent, threshold=0.5) == [[1.5, 0.0, 0.0], [1.5, -0.5, 0.0]]
    values = quantize("ternary", [[0.0, 1e-30, -1e-30, 1.0]], threshold=0.0)
    assert values == [[0.0, 1.5, -0.5, 1.5]]
    values = quantize("ternary", [[1.0, 0.4, -0.4, 0.2, -0.2, 0.0, 1.0]])  # Δ is 0.32
    assert values == [[1.5, 1.5, -0.5, 0.0, 0.0, 0.0, 1.5]]


def test_zeros_are_the_same_alone_and_in_a_batch() -> None:
    """Also of latents within rounding of the threshold, by several threads: a sum has one value."""
    latent = torch.randn(8, 300, 300, generator=torch.Generator().manual_seed(0))
    for x, _ in itertools.product(latent, range(3)):  # these few are part of the mean, too
        x[0, :9] = 0.7 * x.double().abs().mean() + torch.arange(-4, 5) * 2.0**-24
    state = {"latent": latent, **dict.fromkeys(("unit", "scale_pos", "scale_neg"), torch.ones(()))}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = make("ternary").quantize(state)
        for i in range(8):
            alone = make("ternary").quantize(state | {"latent": latent[i : i + 1]})
            assert torch.equal(alone[0], together[i]), i
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_uniform(bits: int) -> None:
    """2^bits − 1 of them in a channel, symmetric, all in use, the nearest one taken."""
    generator = torch.Generator().manual_seed(bits)
    u = 2 * torch.rand(1, 3, 20_000, generator=generator) - 1
    quantizer, unit = make("uniform", bits=bits), torch.full((1, 1, 1), 0.37)
    values, q = quantizer.quantize({"latent": u, "unit": unit}), 2 ** (bits - 1) - 1
    for latent, channel in zip(u[0], values[0], strict=True):
        levels = channel.unique()
        assert len(levels) == 2 * q + 1
        assert torch.equal(levels, -levels.flip(0))
        assert levels[-1] == 0.37 * latent.abs().max()
        half = levels[-1].double() / q / 2
        assert ((channel.double() - 0.37 * latent.double()).abs() <= half * (1 + 1e-4)).all()
    assert torch.equal(quantizer.quantize({"latent": -u, "unit": unit}), -values)


def test_ties_of_uniform_go_to_the_even_level() -> None:
    """With q = 2 in units of a: halfway between 0 and ½ to 0, between ½ and 1 to 1 (q is 3: ⅓)."""
    assert quantize("uniform", [[1.0, 0.5, -0.5, 0.49]], bits=2) == [[2.0, 0.0, 0.0, 0.0]]
    (values,) = quantize("uniform", [[6.0, 1.0, 3.0, 5.0, -5.0]], bits=3)
    assert values == pytest.approx([12.0, 0.0, 8.0, 8.0, -8.0])

"""What holds after every step, whatever the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    MAIN_KINDS,
    PATHS,
    SHAPES,
    TORCH_PATHS,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    make_params,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)

SIZES = st.sampled_from([0.0, 1e-45, 1e-40, 1e-20, 1e-3, 1.0, 1e3, 1e10, 1e18, 1e30])
LOSSES = st.sampled_from([0.0, 1e-40, 1e-3, 0.5, 3.0, 1e10, 1e30, -1.0])


@st.composite
def gradients(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Of one size, of many sizes, or zero but for one element."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = torch.randn(shape, generator=generator)
    style = draw(st.sampled_from(["one size", "many sizes", "one element"]))
    if style == "one size":
        return values * draw(SIZES)
    if style == "many sizes":
        return values * 10.0 ** torch.randint(-40, 20, shape, generator=generator)
    result = torch.zeros(shape)
    result.view(-1)[int(torch.randint(0, result.numel(), (), generator=generator))] = draw(SIZES)
    return result


@ALL_KINDS
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60)
@given(data=st.data())
def test_steps_keep_the_promises(kind: Kind, path: str, data: st.DataObject) -> None:
    """Latents in the box, scales positive, parameters exactly Q of them, nothing infinite."""
    shape = data.draw(st.sampled_from([(1, 1), (1, 3), (4, 1), (3, 4), (2, 2, 3, 3)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    scale = data.draw(st.sampled_from([0.0, 1e-3, 0.3]))
    params = make_params((shape, (3,)), dtype, seed=data.draw(st.integers(0, 1000)), scale=scale)
    optimizer = kind.make(
        params,
        lr=data.draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0])),
        momentum=data.draw(st.sampled_from([0.0, 0.9])),
        weight_decay=data.draw(st.sampled_from([0.0, 1e-2])),
        **PATHS[path],
    )
    for _ in range(data.draw(st.integers(1, 4))):
        for p in params:
            p.grad = data.draw(gradients(tuple(p.shape))).to(dtype)
        before = everything(optimizer)
        optimizer.step(loss=data.draw(LOSSES))
        gamma = float(optimizer.gamma)
        if math.isnan(gamma):
            assert_same_values(everything(optimizer), before)
        else:
            assert 0.0 <= gamma <= 1.0
        assert_consistent(optimizer)


def assert_same_values(after: Any, before: Any) -> None:
    """Nothing changed; a skipped first step may have made momentum buffers, if they are zero."""
    assert after[0] == before[0]
    assert after[2] == before[2]
    for new, old in zip(after[1], before[1], strict=True):
        for name, value in new.items():
            if name in old or "momentum_buffer" not in name:
                assert value == old[name], name
            else:
                assert set(value[2]) == {0}


@ALL_KINDS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "last gradient"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", [False, True])
def test_not_finite_changes_nothing(
    kind: Kind, bad: float, where: str, path: str, first: bool
) -> None:
    params = make_params()
    optimizer = kind.make(params, **PATHS[path], weight_decay=1e-2)
    if not first:
        train(optimizer, params, 3)
    assert not optimizer.skipped_steps
    before = everything(optimizer)
    for skipped in (1, 2):
        draw_gradients(params, seed=7)
        victim = params[0] if where == "gradient" else params[-1]
        assert victim.grad is not None
        if where != "loss":
            victim.grad.view(-1)[2] = bad
        loss = torch.tensor(bad if where == "loss" else 0.5)
        assert optimizer.step(loss=loss) is loss
        assert_same_values(everything(optimizer), before)
        assert math.isnan(float(optimizer.gamma))
        assert int(optimizer.skipped_steps) == skipped
    assert optimizer.skipped_steps.dtype == torch.int64
    assert optimizer.skipped_steps.dim() == 0

    # Training goes on as if the steps had not been asked for.
    other_params = make_params()
    other = kind.make(other_params, **PATHS[path], weight_decay=1e-2)
    if not first:
        train(other, other_params, 3)
    train(optimizer, params, 3, seed=1)
    train(other, other_params, 3, seed=1)
    assert everything(optimizer) == everything(other)
    assert 0.0 <= float(optimizer.gamma) <= 1.0
    assert int(optimizer.skipped_steps) == 2


@ALL_KINDS
def test_overflowing_norm_changes_nothing(kind: Kind) -> None:
    """Gradients that are finite, but whose squares are not, give no γ."""
    params = make_params()
    optimizer = kind.make(params)
    train(optimizer, params, 2)
    before = everything(optimizer)
    draw_gradients(params, seed=1, scale=1e30)
    optimizer.step(loss=1.0)
    assert math.isnan(float(optimizer.gamma))
    assert int(optimizer.skipped_steps) == 1
    assert everything(optimizer) == before


def assert_steps_agree(
    optimizer: Any,
    params: list[Parameter],
    other: Any,
    twins: list[Parameter],
    steps: int,
    seed: int,
    loss: float,
) -> None:
    """Two optimizers, given the same gradients, take the same steps but for rounding."""
    for number in range(steps):
        draw_gradients(params, seed + number)
        for p, twin in zip(params, twins, strict=True):
            twin.grad = None if p.grad is None else p.grad.clone()
        optimizer.step(loss=loss)
        other.step(loss=loss)
        torch.testing.assert_close(other.gamma, optimizer.gamma, rtol=1e-11, atol=1e-13)
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(twin, p, rtol=1e-10, atol=1e-12)


@ALL_KINDS
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), lr=st.sampled_from([0.03, 0.3]), decay=st.booleans())
def test_foreach_equals_single_tensor(kind: Kind, seed: int, lr: float, decay: bool) -> None:
    params = make_params((*SHAPES, (1, 1), (2,)), torch.float64, seed)
    twins = clone_params(params)
    options = {"lr": lr, "weight_decay": 1e-2 if decay else 0.0}
    single = kind.make(params, foreach=False, **options)
    multi = kind.make(twins, foreach=True, **options)
    assert_steps_agree(single, params, multi, twins, steps=5, seed=seed, loss=1.0)


@ALL_KINDS
@pytest.mark.parametrize("path", TORCH_PATHS)
@settings(max_examples=15)
@given(data=st.data())
def test_splitting_and_ordering_groups_changes_nothing(
    kind: Kind, path: str, data: st.DataObject
) -> None:
    """γ is one for all: which group a parameter is in matters only through the group's settings."""
    shapes = ((3, 4), (2, 2, 2), (1, 5), (4,), (2,))
    seed = data.draw(st.integers(0, 10**6))
    params = make_params(shapes, torch.float64, seed)
    twins = clone_params(params)
    whole = kind.make(params, **PATHS[path], weight_decay=1e-2)
    order = data.draw(st.permutations(range(len(shapes))))
    split = [group for index in order for group in kind.groups([twins[index]])]
    parts = kind.optimizer(split, **kind.settings, **PATHS[path], weight_decay=1e-2)
    assert_steps_agree(whole, params, parts, twins, steps=4, seed=seed, loss=0.7)


@ALL_KINDS
def test_deterministic(kind: Kind) -> None:
    """The same run twice gives the same bits."""
    results = []
    for _ in range(2):
        params = make_params()
        optimizer = kind.make(params)
        train(optimizer, params, 10)
        results.append(everything(optimizer))
    assert results[0] == results[1]


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])
def test_steps_of_latents_do_not_depend_on_the_layers_magnitude(
    optimizer_class: Any, size: float
) -> None:
    """Latents take the same path if weights and gradients are scaled alike: ηM⁻¹δ with δ ∝ c."""
    latents = []
    for factor in (1.0, size):
        params = make_params(((3, 4),), torch.float64)
        with torch.no_grad():
            params[0].mul_(factor)
        optimizer = optimizer_class(params, eps=0.0)
        for number in range(5):
            draw_gradients(params, number)
            assert params[0].grad is not None
            params[0].grad *= factor
            # The loss is quadratic in the weights, as the gradient is linear.
            optimizer.step(loss=0.5 * factor**2)
        latents.append(optimizer.state[params[0]]["latent"])
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-9, atol=1e-12)


def test_scales_stay_positive_under_pressure() -> None:
    """A loss that wants W_p and W_n negative gets them at the lower bound."""
    p = Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    optimizer = TernaryDFW([p], lr=1.0, momentum=0.9)
    for _ in range(30):
        p.grad = 100 * p.detach().sign()
        optimizer.step(loss=1000.0)
        assert optimizer.state[p]["scale_pos"] > 0
        assert optimizer.state[p]["scale_neg"] > 0
    assert_consistent(optimizer)


@pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
def test_gradients_are_not_changed(kind: Kind) -> None:
    """Weight decay and pull-backs do not write into .grad."""
    params = make_params()
    optimizer = kind.make(params, weight_decay=0.1)
    draw_gradients(params, 0)
    before = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step(loss=1.0)
    for p, gradient in zip(params, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)


def test_one_loss_serves_all_groups() -> None:
    """γ couples the groups: a large gradient in one shortens the step of the other."""
    moves = []
    for size in (0.0, 100.0):
        left, right = make_params(((3,), (3,)))
        before = left.detach().clone()
        optimizer = DFW([{"params": [left]}, {"params": [right]}], momentum=0.0)
        left.grad, right.grad = torch.ones(3), torch.full((3,), size)
        optimizer.step(loss=0.2)
        moves.append(float((before - left.detach()).norm()))
    assert moves[1] < moves[0] / 100

"""What holds after every step, in both norms, whatever the gradients."""

import math

import pytest
import torch
from helpers import (
    assert_consistent,
    clone_params,
    copy_gradients,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import ALL_KINDS, BOTH_NORMS, QUANTIZED_KINDS, Kind
from torch import Tensor
from torch.nn import Parameter

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

LOSSES = st.floats(0, 100) | st.sampled_from([0.0, 1e-30, 1e30, math.nan, math.inf, -1.0])


@st.composite
def gradients(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Of any size, of rank one, zero, and now and then not finite in one place."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["normal"] * 5 + ["zero", "one row", "rank one", "not finite"]))
    g = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-35, 30))
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "one row":
        g[1:] = 0
    if kind == "rank one":
        g[:] = g[0].clone()
    if kind == "not finite":
        g.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return g


@ALL_KINDS
@settings(max_examples=15)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:the loss is negative")
def test_constraints(kind: Kind, data: st.DataObject) -> None:
    """Latents and weights in the box, p = Q(u), scales at least 0.001, and all finite."""
    scale = data.draw(st.sampled_from([1e-8, 0.3, 100.0]))
    params = make_params(seed=data.draw(st.integers(0, 1000)), scale=scale)
    optimizer = kind.make(
        params,
        lr=data.draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0])),
        momentum=data.draw(st.sampled_from([0.0, 0.9])),
        weight_decay=data.draw(st.sampled_from([0.0, 1e-2])),
    )
    assert_consistent(optimizer)
    skipped = 0
    for _ in range(data.draw(st.integers(1, 4))):
        for p in params:
            p.grad = data.draw(gradients(tuple(p.shape)))
        before, loss = everything(optimizer), data.draw(LOSSES)
        kept = fingerprint([p.grad for p in params])
        optimizer.step(loss=loss)
        assert fingerprint([p.grad for p in params]) == kept
        assert_consistent(optimizer)
        # A gradient whose norm float32 cannot hold counts as infinite.
        sizes = [torch.linalg.vector_norm(p.grad) for p in params if p.grad is not None]
        if math.isfinite(loss) and all(size.isfinite() for size in sizes):
            assert 0.0 <= float(optimizer.gamma) <= 1.0
        else:
            skipped += 1
            assert everything(optimizer) == before
            assert math.isnan(float(optimizer.gamma))
        assert int(optimizer.skipped_steps) == skipped


@ALL_KINDS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [False, True])
def test_not_finite_changes_nothing(kind: Kind, bad: float, first: bool) -> None:
    """Parameters, state and the plane's height stay to the bit, and so does what comes after."""
    params, twins = make_params(), make_params()
    optimizer = kind.make(params, weight_decay=1e-2, lr=(lr := torch.tensor(0.07)))
    other = kind.make(twins, weight_decay=1e-2, lr=torch.tensor(0.07))
    if not first:
        train(optimizer, params, 3)
        train(other, twins, 3)
    before = everything(optimizer)
    for skipped, where in enumerate(("loss", "first", "last", "lr"), 1):
        draw_gradients(params, seed=7)
        victim = params[0 if where == "first" else -1]
        assert victim.grad is not None
        if where in ("first", "last"):
            victim.grad.view(-1)[2] = bad
        loss = torch.tensor(bad if where == "loss" else 0.5)
        lr.fill_(bad if where == "lr" else 0.07)
        assert optimizer.step(loss=loss) is loss
        lr.fill_(0.07)
        assert everything(optimizer) == before
        assert math.isnan(float(optimizer.gamma))
        assert int(optimizer.skipped_steps) == skipped
    train(optimizer, params, 3, seed=1)
    train(other, twins, 3, seed=1)
    assert everything(optimizer) == everything(other)
    assert int(optimizer.skipped_steps) == 4


@ALL_KINDS
@settings(max_examples=6)
@given(data=st.data())
def test_groups_and_their_order_do_not_matter(kind: Kind, data: st.DataObject) -> None:
    """γ is one for all: which group a parameter is in matters only through the group's settings.

    Sums are added up in another order: 1e-16, times up to 10⁴ in orthogonal factors.
    """
    shapes = ((3, 4), (2, 2, 2), (1, 5), (3, 4), (4,), (2,))
    seed = data.draw(st.integers(0, 10**6))
    params = make_params(shapes, torch.float64, seed)
    twins = clone_params(params)
    whole = kind.make(params, weight_decay=1e-2)
    order = data.draw(st.permutations(range(len(shapes))))
    split = [group for index in order for group in kind.groups([twins[index]])]
    parts = kind.optimizer(split, **kind.settings, weight_decay=1e-2)
    for number in range(4):
        draw_gradients(params, seed + number)
        copy_gradients(params, twins)
        whole.step(loss=0.7)
        parts.step(loss=0.7)
        torch.testing.assert_close(parts.gamma, whole.gamma, rtol=1e-11, atol=1e-13)
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(twin, p, rtol=1e-10, atol=1e-12)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("loss", [1e-3, 1e3], ids=["small", "large"])
@pytest.mark.parametrize("power", [-30, -3, 0, 3, 18])
@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_relative_length(power: int, lr: float, loss: float) -> None:
    """A spectral step has the length lr·γ·ρ: of vectors exactly, of matrices times 0.79 to 1.21."""
    scale = 10.0**power
    params = make_params(((4, 20), (20, 4), (3, 2, 3, 3), (6,)), scale=0.3)
    params.append(Parameter(torch.tensor(2.0)))
    before = clone_params(params)
    optimizer = DFW(params, lr=lr, eps=0.0)
    draw_gradients(params, 1, scale)
    optimizer.step(loss=loss * scale)
    gamma = float(optimizer.gamma)
    assert gamma == 1.0 if loss > 1 else 0.0 < gamma < 1.0
    for p, old in zip(params, before, strict=True):
        matrix = p.dim() > 1
        size = rms(old) if matrix else 0.1 * max(1.0, rms(old))
        share = rms(p.detach() - old.detach()) / (lr * gamma * size)
        # A step of 1e-4 of a float32 weight has three digits left.
        exact = pytest.approx(1.0, rel=1e-5 if gamma == 1 else 0.05)
        assert 0.79 <= share <= 1.21 if matrix else share == exact


@pytest.mark.parametrize("kind", [k for k in QUANTIZED_KINDS if k.norm == "spectral"], ids=str)
@pytest.mark.parametrize("power", [-20, 0, 18])
def test_relative_length_of_latents_and_scales(kind: Kind, power: int) -> None:
    params = make_params(((4, 20),))
    optimizer = kind.make(params, lr=0.05, radius=None, eps=0.0)
    state = optimizer.state[params[0]]
    before = {key: value.clone() for key, value in state.items()}
    draw_gradients(params, 1, 10.0**power)
    optimizer.step(loss=1e3 * 10.0**power)
    assert float(optimizer.gamma) == 1.0
    assert 0.79 <= rms(state["latent"] - before["latent"]) / (0.05 * 0.5) <= 1.21
    for key in ("scale_pos", "scale_neg") if "scale_pos" in state else ():
        moved = float((state[key] - before[key]).abs())
        assert moved == pytest.approx(0.05 * 0.1 * float(before[key]), rel=1e-4)


@ALL_KINDS
def test_unit_of_the_loss_does_not_matter(kind: Kind) -> None:
    """Loss and gradients times 1024, with ε = 0: to the bit, as powers of two do not round. In the
    Euclidean norm as long as γ is below 1 and nothing decays: γ falls as the gradients grow.
    """
    results, spectral = [], kind.norm == "spectral"
    for factor in (1.0, 1024.0):
        params = make_params()
        optimizer = kind.make(params, eps=0.0, weight_decay=0.01 if spectral else 0.0)
        for number in range(6):
            draw_gradients(params, number, factor)
            optimizer.step(loss=(0.5 if spectral else 0.02) * factor)
            assert 0.0 < float(optimizer.gamma) < 1.0
        results.append(everything(optimizer)[0])
    assert results[0] == results[1]


@BOTH_NORMS
def test_scales_stay_positive_under_pressure(norm: str) -> None:
    """A loss that wants W_p and W_n negative gets them at the lower bound, exactly."""
    p = Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    optimizer = TernaryDFW([p], lr=1.0, norm=norm)
    state, least = optimizer.state[p], torch.tensor(1e-3)
    for _ in range(30):
        p.grad = 100 * state["latent"].sign()
        optimizer.step(loss=1e5)
        assert_consistent(optimizer)
    assert state["scale_pos"] == state["scale_neg"] == least


@ALL_KINDS
@pytest.mark.parametrize("std", [1e-11, 1e-4, 0.1])
def test_a_tiny_layer_outgrows_its_start(kind: Kind, std: float) -> None:
    """Beyond half of the usual 1/√n, for a teacher of four times that; the box kind ends at ½."""
    (p,) = make_params(((6, 16),), scale=std)
    target = make_params(((6, 16),), seed=1, scale=1.0)[0].detach().sign()
    optimizer, losses = kind.make([p], lr=0.5 if kind.norm == "spectral" else 0.1), []
    for _ in range(150):
        loss = 0.5 * (p - target).square().sum()
        p.grad = p.detach() - target
        losses.append(float(loss))
        optimizer.step(loss=loss.detach())
    assert_consistent(optimizer)
    assert rms(p) >= max(0.5 * 16**-0.5, 1.5 * std)
    assert losses[-1] <= 0.8 * losses[0]


@BOTH_NORMS
@pytest.mark.parametrize("start", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("shape", [(4,), ()], ids=["vector", "number"])
def test_vectors_learn(shape: tuple[int, ...], start: float, norm: str) -> None:
    """Biases of 0, LayerScale at 1e-6, norms' weights at 1: to 1.5, and beyond, at the defaults."""
    for target in (-0.5, 1.5):
        p = Parameter(torch.full(shape, start))
        optimizer = DFW([p], norm=norm)
        for _ in range(300):
            p.grad = p.detach() - target
            optimizer.step(loss=0.5 * float(p.grad.square().sum()))
        assert rms(p.detach() - target) < 0.1 * abs(start - target)


@BOTH_NORMS
@pytest.mark.parametrize("quantizer", ["binary", "uniform"])
def test_units_double_with_no_change_of_weights(quantizer: str, norm: str) -> None:
    """Latents that crowd at the bounds, from the start or by training: c·u stays to the bit."""
    p = Parameter(torch.tensor([[0.9, -0.9, 0.9], [-0.9, 0.9, -0.9]]))
    weights = p.detach().clone()
    optimizer = ProjectedDFW([p], quantizer=quantizer, norm=norm)
    state, doubled = optimizer.state[p], 0
    assert float(state["unit"]) == pytest.approx(1.8)
    assert torch.equal(state["latent"], weights.sign() / 2)
    assert torch.equal(p, weights)
    for _ in range(150):
        unit = float(state["unit"])
        p.grad = -weights.sign()
        optimizer.step(loss=1.0)
        if float(state["unit"]) != unit:
            doubled += 1
            assert float(state["unit"]) == 2 * unit
            # The step took them beyond ¾ of the box; they are half of that now.
            assert 0.375 < float(state["latent"].abs().mean()) <= 0.5
        assert float(state["latent"].abs().mean()) <= 0.75
    assert doubled


@pytest.mark.parametrize("std", [0.0, 1e-9])
def test_least_sizes(std: float) -> None:
    """ρ of a tiny start: 0.1/√fan in of a matrix, 0.1 of vectors, 0.5 of latents as ever;
    0.01/√fan in, in weights, of scales.
    """
    params = make_params(((3, 2, 2, 2), (5,)), scale=std)
    state = DFW(params).state
    assert float(state[params[0]]["size"]) == pytest.approx(0.1 * 8**-0.5)
    assert float(state[params[1]]["size"]) == pytest.approx(0.1)
    for quantizer in ("binary", "ternary"):
        (p, _) = make_params(((3, 2, 2, 2), (5,)), scale=std)
        kept = TernaryDFW([p], quantizer=quantizer).state[p]
        assert float(kept["size"]) == 0.5
        if quantizer == "ternary":
            size = float(kept["scale_neg_size"] * kept["unit"])
            assert size == pytest.approx(0.01 * 8**-0.5, rel=1e-5)

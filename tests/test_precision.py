"""Half and double precision: what is small is not lost, and what is large does not overflow."""

import math
from typing import Any

import pytest
import torch
from helpers import (
    assert_consistent,
    copy_gradients,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    same_bits,
    train,
)
from kinds import ALL_KINDS, BOTH_NORMS, QUANTIZED_KINDS, Kind
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD

from dfw_opt import DFW, TernaryDFW

QUANTIZED = pytest.mark.parametrize("kind", QUANTIZED_KINDS, ids=str)
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
LR, STEPS = 0.05, 400
# A step takes less of the weights than half of what the dtype can tell from 1.
DECAY = {torch.bfloat16: 0.025, torch.float16: 0.008}


def opposite(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Noise whose second half is minus the first, so that it moves no mean."""
    generator = torch.Generator().manual_seed(number)
    half = torch.randn(shape[0] // 2, *shape[1:], generator=generator)
    return torch.cat([half, -half]).to(dtype)


def mean_after(optimizer: Any, p: Tensor, **loss: float) -> float:
    for number in range(STEPS):
        p.grad = opposite(number, tuple(p.shape), p.dtype)
        optimizer.step(**loss)
    return p.detach().double().mean().item()


@NARROW
@pytest.mark.parametrize(("momentum", "shape"), [(0.0, (256,)), (0.9, (32, 8))])
@BOTH_NORMS
def test_decay(dtype: torch.dtype, momentum: float, shape: tuple[int, ...], norm: str) -> None:
    """As SGD's, which adds it to the gradient before anything is rounded."""
    settings: Any = {"momentum": momentum, "weight_decay": DECAY[dtype]}
    p, q = (Parameter(torch.ones(shape, dtype=dtype)) for _ in range(2))
    # The loss is so large that γ is 1: with the Euclidean norm that is SGD with Nesterov.
    ours = mean_after(DFW([p], LR, norm=norm, **settings), p, loss=1e6)
    theirs = mean_after(SGD([q], LR, nesterov=momentum > 0, foreach=False, **settings), q)
    # With momentum the decay of SGD, and of the Euclidean step, is 1 / (1 - μ) times as much.
    rate = LR * DECAY[dtype] / (1 - momentum if norm == "euclidean" else 1)
    # Rounded at random, by up to 2**-8 of about 1: of 256 numbers and 400 steps the mean is off by
    # 0.003 or so, where decay that is lost makes it 1.
    assert ours == pytest.approx(math.exp(-rate * STEPS), abs=0.02)
    if norm == "euclidean" or momentum == 0:
        assert ours == pytest.approx(theirs, abs=0.02)


@BOTH_NORMS
@NARROW
def test_narrow_lr_and_loss(dtype: torch.dtype, norm: str) -> None:
    """Numbers of 16 bits are what they are, and are not multiplied in 16 bits."""
    ends, mean = [], 0.0
    for as_number in (False, True):
        lr, loss = torch.tensor(0.1, dtype=dtype), torch.tensor(3e3, dtype=dtype)
        p = Parameter(torch.ones(8, 4))
        given: Any = lr.item() if as_number else lr
        optimizer = DFW([p], given, weight_decay=1e-3, momentum=0.0, norm=norm)
        for number in range(20):
            p.grad = opposite(number, (8, 4), torch.float32)
            optimizer.step(loss=loss.item() if as_number else loss)
        ends.append(p.detach())
        mean = math.exp(-lr.item() * 1e-3 * 20)
    # A tensor and a number round products in another order, each to 6e-8.
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    assert ends[0].mean().item() == pytest.approx(mean, rel=1e-5)


@NARROW
@QUANTIZED
def test_latents_are_those_of_float32(kind: Kind, dtype: torch.dtype) -> None:
    """From the same weights and gradients: the same bits; and weights are those rounded."""
    narrow = make_params(dtype=dtype)[:2]
    wide = [Parameter(p.detach().float()) for p in narrow]
    optimizer, other = kind.make(narrow, weight_decay=0.01), kind.make(wide, weight_decay=0.01)
    for number in range(4):
        draw_gradients(narrow, number)
        copy_gradients(narrow, wide)
        for o in (optimizer, other):
            o.step(loss=0.5)
    for p, q in zip(narrow, wide, strict=True):
        assert fingerprint(optimizer.state[p]) == fingerprint(other.state[q])
        assert same_bits(p, q.to(dtype))


@NARROW
@ALL_KINDS
def test_large_gradients(kind: Kind, dtype: torch.dtype) -> None:
    """Each fits into float16, their squares and sums do not: γ is that of float32."""
    narrow = make_params(dtype=dtype)
    gammas = []
    for params in (narrow, [Parameter(p.detach().float()) for p in narrow]):
        optimizer = kind.make(params, lr=1.0)
        draw_gradients(narrow, 0, 1e4)
        copy_gradients(narrow, params)
        optimizer.step(loss=1e3)
        gammas.append(float(optimizer.gamma))
    assert 0 < gammas[0] < 1
    assert gammas[0] == pytest.approx(gammas[1], rel=1e-5)


@ALL_KINDS
def test_dtypes_side_by_side(kind: Kind) -> None:
    """Each parameter keeps its dtype, and state the wider of that and float32."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [make_params(((4, 6),), dtype)[0] for dtype in dtypes]
    optimizer = kind.make(params, weight_decay=0.01)
    train(optimizer, params, 3)
    assert [p.dtype for p in params] == dtypes
    for p in params:
        kept = {value.dtype for value in optimizer.state[p].values()}
        assert kept == {torch.promote_types(p.dtype, torch.float32)}
    assert optimizer.gamma.dtype == torch.float64
    assert_consistent(optimizer)


@BOTH_NORMS
def test_gamma_in_double_precision(norm: str) -> None:
    """ℓ / (η⟨m, D⟩), to the last digits; the spectral D of one number is 0.1 times a sign."""
    p = Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = DFW([p], 10.0, momentum=0.0, eps=0.0, norm=norm)
    p.grad = torch.tensor([1 / 3], dtype=torch.float64)
    loss = torch.tensor(0.1234567890123, dtype=torch.float64)
    optimizer.step(loss=loss)
    full = 10 / 9 if norm == "euclidean" else 10 * 0.1 / 3
    assert optimizer.gamma.item() == pytest.approx(loss.item() / full, rel=1e-15)
    # The step goes to where the plane is zero.
    assert abs((loss + (p.detach() - 0.5) @ p.grad).item()) < 1e-16


@pytest.mark.parametrize("optimizer_class", [DFW, TernaryDFW])
@NARROW
@BOTH_NORMS
def test_default_dtype_does_not_matter(optimizer_class: Any, dtype: Any, norm: str) -> None:
    ends = []
    for default in (torch.float32, dtype):
        params = make_params()[:2]
        torch.set_default_dtype(default)
        try:
            optimizer = optimizer_class(params, norm=norm)
            train(optimizer, params, 3)
            ends.append((everything(optimizer), fingerprint(optimizer.gamma)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert ends[0] == ends[1]


@ALL_KINDS
def test_autocast_does_not_matter(kind: Kind) -> None:
    """To the bit, where the whole loop is inside."""
    results = []
    for enabled in (False, True):
        params = make_params()
        optimizer = kind.make(params)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            train(optimizer, params, 3)
        results.append(everything(optimizer))
    assert results[0] == results[1]

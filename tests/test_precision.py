"""Half and double precision: what is small is not lost, and what is large does not overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    QUANTIZED_KINDS,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    same_bits,
    train,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
QUANTIZED = pytest.mark.parametrize("kind", QUANTIZED_KINDS, ids=str)
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
NORMS = pytest.mark.parametrize("norm", ["spectral", "euclidean"])


def opposite(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Noise whose second half is minus the first, so that it moves no mean."""
    generator = torch.Generator().manual_seed(number)
    half = torch.randn(shape[0] // 2, *shape[1:], generator=generator)
    return torch.cat([half, -half]).to(dtype)


class TestDecay:
    """Each step takes less of the weights than half of what the dtype can tell from 1."""

    STEPS, LR = 400, 0.02
    DECAY = {torch.bfloat16: 0.025, torch.float16: 0.01}

    def mean_after(self, optimizer: Any, p: Tensor, **loss: float) -> float:
        for number in range(self.STEPS):
            p.grad = opposite(number, tuple(p.shape), p.dtype)
            optimizer.step(**loss)
        return p.detach().double().mean().item()

    @NARROW
    @pytest.mark.parametrize(("momentum", "shape"), [(0.0, (256,)), (0.9, (32, 8))])
    @NORMS
    def test_of_parameters(
        self, dtype: torch.dtype, momentum: float, shape: tuple[int, ...], norm: str
    ) -> None:
        """As SGD's, which adds it to the gradient before anything is rounded."""
        settings = {"momentum": momentum, "weight_decay": self.DECAY[dtype]}
        p = Parameter(torch.ones(shape, dtype=dtype))
        # The loss is so large that γ is 1: with the Euclidean norm that is SGD with Nesterov.
        ours = self.mean_after(DFW([p], self.LR, norm=norm, **settings), p, loss=1e6)
        q = Parameter(torch.ones(shape, dtype=dtype))
        sgd = SGD([q], self.LR, nesterov=momentum > 0, foreach=False, **settings)
        theirs = self.mean_after(sgd, q)
        # With momentum the decay of SGD, and of the Euclidean step, is 1 / (1 - μ) times as much.
        rate = self.LR * self.DECAY[dtype] / (1 - momentum if norm == "euclidean" else 1)
        expected = math.exp(-rate * self.STEPS)
        # Rounded at random, by up to 2**-8 of about 1: of 256 numbers and 400 steps the mean is
        # off by 0.003 or so, where decay that is lost makes it 1.
        assert ours == pytest.approx(expected, abs=0.02)
        if norm == "euclidean" or momentum == 0:
            assert ours == pytest.approx(theirs, abs=0.02)

    @NORMS
    @NARROW
    def test_of_a_narrow_lr(self, dtype: torch.dtype, norm: str) -> None:
        """An lr of 16 bits is the number that it is, and is not multiplied in 16 bits."""
        ends = []
        for lr in (torch.tensor(0.1, dtype=dtype), torch.tensor(0.1, dtype=dtype).item()):
            p = Parameter(torch.ones(8, 4))
            optimizer = DFW([p], lr, weight_decay=1e-3, momentum=0.0, norm=norm)
            for number in range(20):
                p.grad = opposite(number, (8, 4), torch.float32)
                optimizer.step(loss=1e6)
            ends.append(p.detach())
        # A tensor and a number round products in another order, each to 6e-8.
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
        mean = math.exp(-float(torch.tensor(0.1, dtype=dtype)) * 1e-3 * 20)
        assert ends[0].mean().item() == pytest.approx(mean, rel=1e-5)


class TestNarrow:
    @NARROW
    @QUANTIZED
    def test_latents_are_those_of_float32(self, kind: Kind, dtype: torch.dtype) -> None:
        """From the same weights and gradients: the same bits; and weights are those rounded."""
        narrow = make_params(dtype=dtype)[:2]
        wide = [Parameter(p.detach().float()) for p in narrow]
        optimizer, other = kind.make(narrow, weight_decay=0.01), kind.make(wide, weight_decay=0.01)
        for number in range(4):
            draw_gradients(narrow, number)
            for p, q in zip(narrow, wide, strict=True):
                assert p.grad is not None
                q.grad = p.grad.float()
            for o in (optimizer, other):
                o.step(loss=0.5)
        for p, q in zip(narrow, wide, strict=True):
            assert fingerprint(optimizer.state[p]) == fingerprint(other.state[q])
            assert same_bits(p, q.to(dtype))

    @NARROW
    @ALL_KINDS
    def test_large_gradients(self, kind: Kind, dtype: torch.dtype) -> None:
        """Each fits into float16, their squares and sums do not: γ is that of float32."""
        narrow = make_params(dtype=dtype)
        wide = [Parameter(p.detach().float()) for p in narrow]
        gammas = []
        for params in (narrow, wide):
            optimizer = kind.make(params, lr=1.0)
            draw_gradients(params, 0, 1e4)
            for p, q in zip(params, narrow, strict=True):
                assert q.grad is not None
                p.grad = q.grad.clone().to(p.dtype)
            optimizer.step(loss=1e3)
            assert int(optimizer.skipped_steps) == 0
            gammas.append(float(optimizer.gamma))
        assert 0 < gammas[0] < 1
        assert gammas[0] == pytest.approx(gammas[1], rel=1e-5)

    @NARROW
    @NORMS
    def test_a_narrow_loss_is_not_rounded_again(self, dtype: torch.dtype, norm: str) -> None:
        gammas = []
        for loss in (torch.tensor(0.3, dtype=dtype), torch.tensor(0.3, dtype=dtype).item()):
            params = make_params()
            optimizer = DFW(params, lr=1.0, norm=norm)
            draw_gradients(params, 0)
            optimizer.step(loss=loss)
            gammas.append(float(optimizer.gamma))
        assert gammas[0] == gammas[1] < 1

    @ALL_KINDS
    def test_a_step_under_autocast(self, kind: Kind) -> None:
        """Where a loop leaves it in the context: matrix products are rounded, and nothing else."""
        ends = []
        for enabled in (False, True):
            params = make_params()
            optimizer = kind.make(params)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                train(optimizer, params, 2)
            ends.append([optimizer.state[p].get("latent", p).detach() for p in params])
        # Ten products in a row, rounded to 2**-9 each, of directions of size 1 times lr = 0.1.
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0.01)


class TestWide:
    @ALL_KINDS
    def test_dtypes_side_by_side(self, kind: Kind) -> None:
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
        narrow = kind.make(clone_params(params[1:]))
        assert narrow.gamma.dtype == torch.float32

    @NORMS
    def test_gamma_in_double_precision(self, norm: str) -> None:
        """ℓ / (η⟨m, D⟩), to the last digits; the spectral D of one number is 0.1 times a sign."""
        vector = Parameter(torch.tensor([0.5], dtype=torch.float64))
        optimizer = DFW([vector], 10.0, momentum=0.0, eps=0.0, norm=norm)
        vector.grad = torch.tensor([1 / 3], dtype=torch.float64)
        loss = torch.tensor(0.1234567890123, dtype=torch.float64)
        optimizer.step(loss=loss)
        full = 10 / 9 if norm == "euclidean" else 10 * 0.1 / 3
        assert optimizer.gamma.item() == pytest.approx(loss.item() / full, rel=1e-15)
        assert optimizer.gamma.dtype == torch.float64
        # The step goes to where the plane is zero.
        left = loss + (vector.detach() - 0.5) @ vector.grad
        assert abs(left.item()) < 1e-16

    @pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
    @pytest.mark.parametrize("default", [torch.float16, torch.bfloat16], ids=str)
    @NORMS
    def test_narrow_default_dtype_does_not_matter(
        self, optimizer_class: Any, default: torch.dtype, norm: str
    ) -> None:
        ends = []
        for dtype in (torch.float32, default):
            params = make_params()[:2]
            torch.set_default_dtype(dtype)
            try:
                optimizer = optimizer_class(params, norm=norm)
                train(optimizer, params, 3)
                ends.append((everything(optimizer), fingerprint(optimizer.gamma)))
            finally:
                torch.set_default_dtype(torch.float32)
        assert ends[0] == ends[1]

"""Quantized values, and pull-backs against autograd."""

# torch leaves backward() and the application of a Function untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfw_opt.quantizers import QUANTIZERS, Pulled, binary, ternary

UNIT = torch.tensor(0.37, dtype=torch.float64)


def draw(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Latents in the open box and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    latent = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    return latent, gradient


def quantize_binary(latent: Tensor, unit: Tensor) -> Tensor:
    return binary.quantize(latent, unit, binary.mean_magnitude(latent))


def pull_back_binary(grad: Tensor, latent: Tensor, unit: Tensor) -> Pulled:
    return binary.pull_back(grad, latent, unit, binary.mean_magnitude(latent))


def quantize_ternary(
    latent: Tensor, unit: Tensor, pos: Tensor, neg: Tensor, threshold: float
) -> Tensor:
    return ternary.quantize(latent, unit, pos, neg, ternary.threshold_of(latent, threshold))


def pull_back_ternary(
    grad: Tensor, latent: Tensor, unit: Tensor, pos: Tensor, neg: Tensor, threshold: float
) -> dict[str, Pulled]:
    delta = ternary.threshold_of(latent, threshold)
    return ternary.pull_back(grad, latent, unit, pos, neg, delta)


def gradient_and_metric(pulled: Pulled) -> tuple[Tensor, Tensor]:
    d, metric = pulled
    assert metric is not None
    assert metric.dim() == 0
    return d, metric


class SignStraightThrough(torch.autograd.Function):
    """sign forward, hardtanh backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inside: Tensor = x.abs() <= 1
        return grads[0] * inside


class TernaryStraightThrough(torch.autograd.Function):
    """Zones forward; backward the slopes that TTQ gives them: W_p, 1, W_n."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, pos: Tensor, neg: Tensor, threshold: float) -> Tensor:
        delta = threshold * u.abs().max()
        ctx.save_for_backward(u > delta, u < -delta, pos, neg)
        return pos * (u > delta) - neg * (u < -delta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        above, below, pos, neg = ctx.saved_tensors
        slope = torch.where(above, pos, torch.where(below, neg, torch.ones_like(pos)))
        return grads[0] * slope, None, None, None


def binary_jacobian(latent: Tensor, unit: Tensor) -> Tensor:
    """The derivative of Q = c · mean|u| · sign(u), through the mean and through the sign."""

    def weights(u: Tensor) -> Tensor:
        mean = u.abs().mean(dim=tuple(range(1, u.dim())), keepdim=True)
        weights: Tensor = unit * mean * SignStraightThrough.apply(u)
        return weights

    jacobian: Tensor = torch.autograd.functional.jacobian(weights, latent)
    return jacobian.reshape(latent.numel(), latent.numel())


shapes = st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 4), (2, 3, 3), (4, 2, 3, 3)])


class TestBinary:
    @given(shapes, st.integers(0, 10**6))
    def test_pull_back_is_what_a_latent_does_to_its_own_weight(
        self, shape: tuple[int, ...], seed: int
    ) -> None:
        """The diagonal of the derivative of Q, through the mean and through the sign."""
        latent, gradient = draw(shape, seed)
        d, metric = gradient_and_metric(pull_back_binary(gradient, latent, UNIT))
        own = binary_jacobian(latent, UNIT).diagonal().reshape(shape)
        torch.testing.assert_close(metric * d, own * gradient, rtol=1e-12, atol=1e-14)

    @given(st.sampled_from([(1, 1), (1, 5), (1, 3, 3), (1, 200)]), st.integers(0, 10**6))
    def test_no_weights_move_farther_than_those_of_sgd(
        self, shape: tuple[int, ...], seed: int
    ) -> None:
        """The longest change that a gradient of length 1 can make; with one channel it is 1."""
        latent, _ = draw(shape, seed)
        n = latent.numel()
        steps = torch.stack(
            [
                pull_back_binary(unit.reshape(shape), latent, UNIT).gradient.flatten()
                for unit in torch.eye(n, dtype=torch.float64)
            ],
            dim=1,
        )
        changes = binary_jacobian(latent, UNIT) @ steps
        assert float(torch.linalg.matrix_norm(changes, 2)) == pytest.approx(1)
        signs = torch.where(latent >= 0, 1.0, -1.0).to(latent).flatten()
        torch.testing.assert_close(changes @ signs, signs)  # that of the scale
        if n > 1:  # any other, across it, is shorter: the signs' share
            a = latent.abs().mean()
            across = torch.linalg.qr(signs[:, None], mode="complete").Q[:, 1]
            length = float((changes @ across).norm())
            assert length == pytest.approx(float(a / (a + 1)))

    def test_values(self) -> None:
        latent = torch.tensor([[0.5, -0.25, 0.75, -0.5], [0.1, 0.1, -0.1, 0.3]])
        expected = 2.0 * torch.tensor([[0.5, -0.5, 0.5, -0.5], [0.15, 0.15, -0.15, 0.15]])
        torch.testing.assert_close(quantize_binary(latent, torch.tensor(2.0)), expected)

    @given(shapes, st.integers(0, 10**6))
    def test_two_opposite_values_a_channel(self, shape: tuple[int, ...], seed: int) -> None:
        """Exactly: one magnitude a channel, to the last bit."""
        latent = draw(shape, seed)[0].float()
        values = quantize_binary(latent, torch.tensor(0.37))
        assert values.dtype == torch.float32
        for channel, signs in zip(values, latent, strict=True):
            assert len(set(channel.abs().flatten().tolist())) == 1
            assert torch.equal(channel > 0, signs >= 0)
            expected = 0.37 * signs.abs().double().mean()
            assert float(channel.abs().flatten()[0]) == pytest.approx(float(expected), rel=1e-6)

    def test_sign_of_zero_is_plus(self) -> None:
        latent = torch.tensor([[0.0, -0.0, 0.5, -0.5]], dtype=torch.float64)
        values = quantize_binary(latent, torch.tensor(1.0, dtype=torch.float64))
        assert torch.equal(values, torch.tensor([[0.25, 0.25, 0.25, -0.25]], dtype=torch.float64))
        gradient = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
        d, metric = gradient_and_metric(
            pull_back_binary(gradient, latent, torch.tensor(1.0, dtype=torch.float64))
        )
        torch.testing.assert_close(metric * d, (0.25 + 1 / 4) * gradient)

    def test_zero_channel(self) -> None:
        """A channel of zeros is zero, and gets a gradient through its scale: it can come back."""
        latent = torch.tensor([[0.0, -0.0], [0.5, -1.0]])
        values = quantize_binary(latent, torch.tensor(1.0))
        assert torch.equal(values[0], torch.zeros(2))
        d, M = gradient_and_metric(pull_back_binary(torch.ones(2, 2), latent, torch.tensor(1.0)))
        torch.testing.assert_close(d[0], torch.full((2,), 0.5 / M.item()))

    @pytest.mark.parametrize("unit", [0.01, 0.37, 1.0, 5.0])
    def test_metric(self, unit: float) -> None:
        """M is the mean over the channels, and a step of the weights has no unit."""
        latent, gradient = draw((3, 4), 1)
        c = torch.tensor(unit, dtype=torch.float64)
        d, metric = gradient_and_metric(pull_back_binary(gradient, latent, c))
        each = [
            gradient_and_metric(pull_back_binary(gradient[i : i + 1], latent[i : i + 1], c))[1]
            for i in range(3)
        ]
        torch.testing.assert_close(metric, torch.stack(each).mean())
        plain, _ = pull_back_binary(gradient, latent, torch.tensor(1.0, dtype=torch.float64))
        torch.testing.assert_close(d, plain / unit)


class TestTernary:
    scales = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))

    @given(shapes, st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.5, 0.95]))
    def test_pull_back_equals_autograd(
        self, shape: tuple[int, ...], seed: int, threshold: float
    ) -> None:
        """The latent through the surrogate, the scales through Q itself."""
        latent, gradient = draw(shape, seed)
        u = latent.clone().requires_grad_()
        pos, neg = (scale.clone().requires_grad_() for scale in self.scales)
        values = TernaryStraightThrough.apply(u, pos.detach(), neg.detach(), threshold)
        (UNIT * values * gradient).sum().backward()
        delta = threshold * latent.abs().max()
        forward = pos * (latent > delta) - neg * (latent < -delta)
        (UNIT * forward * gradient).sum().backward()

        pulled = pull_back_ternary(gradient, latent, UNIT, *self.scales, threshold)
        assert set(pulled) == {"latent", "scale_pos", "scale_neg"}
        for name, leaf in (("latent", u), ("scale_pos", pos), ("scale_neg", neg)):
            d, metric = gradient_and_metric(pulled[name])
            assert d.shape == leaf.shape
            assert leaf.grad is not None
            torch.testing.assert_close(metric * d, leaf.grad, rtol=1e-12, atol=1e-14)

    def test_scales_by_finite_differences(self) -> None:
        """What a larger W_n does to the loss: the sign that the paper's formula gets wrong."""
        latent, gradient = draw((4, 5), 7)
        pulled = pull_back_ternary(gradient, latent, UNIT, *self.scales, 0.05)
        h = 1e-6
        for index, name in enumerate(("scale_pos", "scale_neg")):
            ends = []
            for side in (1, -1):
                pos, neg = self.scales
                if index == 0:
                    pos = pos + side * h
                else:
                    neg = neg + side * h
                values = quantize_ternary(latent, UNIT, pos, neg, 0.05)
                ends.append((values * gradient).sum())
            d, metric = gradient_and_metric(pulled[name])
            torch.testing.assert_close(metric * d, (ends[0] - ends[1]) / (2 * h))

    def test_larger_negative_weights_want_larger_scale(self) -> None:
        """If the loss falls as the negative weights become more negative, W_n must grow."""
        latent = torch.tensor([[-0.5, -1.0, 0.7]])
        gradient = torch.tensor([[1.0, 1.0, 0.0]])
        one = torch.tensor(1.0)
        d, _ = pull_back_ternary(gradient, latent, one, one, one, 0.05)["scale_neg"]
        assert float(d) == pytest.approx(-1.0)

    def test_values(self) -> None:
        latent = torch.tensor([[1.0, 0.3, 0.2, 0.1, 0.0], [-0.0, -0.1, -0.2, -0.3, -0.9]])
        values = quantize_ternary(
            latent, torch.tensor(2.0), torch.tensor(0.75), torch.tensor(0.25), 0.2
        )
        expected = torch.tensor([[1.5, 1.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -0.5, -0.5]])
        assert torch.equal(values, expected)

    def test_at_the_threshold_is_zero(self) -> None:
        """Both u > Δ and u < −Δ are strict; 0.5 · 1.0 is exact."""
        latent = torch.tensor([[1.0, 0.5, -0.5, 0.5000001, -0.5000001]])
        one = torch.tensor(1.0)
        values = quantize_ternary(latent, one, one, one, 0.5)
        assert values.tolist() == [[1.0, 0.0, 0.0, 1.0, -1.0]]
        pulled = pull_back_ternary(torch.ones(1, 5), latent, one, 3 * one, 2 * one, 0.5)
        d, M = gradient_and_metric(pulled["latent"])
        torch.testing.assert_close(M * d, torch.tensor([[3.0, 1.0, 1.0, 3.0, 2.0]]))

    def test_threshold_zero(self) -> None:
        one = torch.tensor(1.0)
        latent = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 1.0]])
        values = quantize_ternary(latent, one, one, one, 0.0)
        assert values.tolist() == [[0.0, 0.0, 1.0, -1.0, 1.0]]

    def test_threshold_is_of_the_whole_tensor(self) -> None:
        """One Δ a layer, not one a channel."""
        one = torch.tensor(1.0)
        latent = torch.tensor([[1.0, -1.0], [0.04, -0.04]])
        values = quantize_ternary(latent, one, one, one, 0.05)
        assert values.tolist() == [[1.0, -1.0], [0.0, 0.0]]

    def test_all_zero(self) -> None:
        one = torch.tensor(1.0)
        latent = torch.zeros(2, 3)
        assert torch.equal(quantize_ternary(latent, one, one, one, 0.05), latent)
        pulled = pull_back_ternary(torch.full((2, 3), 2.0), latent, one, one, one, 0.05)
        assert torch.equal(pulled["latent"][0], torch.full((2, 3), 2.0))
        for name in ("scale_pos", "scale_neg"):
            assert [x.item() for x in gradient_and_metric(pulled[name])] == [0.0, 1.0]

    def test_one_zone_empty(self) -> None:
        latent = torch.tensor([[0.5, 1.0, 0.0]])
        one = torch.tensor(1.0)
        pulled = pull_back_ternary(torch.ones(1, 3), latent, one, one, one, 0.05)
        assert pulled["scale_pos"][0].item() == 1.0
        assert pulled["scale_neg"][0].item() == 0.0
        assert all(torch.isfinite(d).all() for d, _ in pulled.values())

    @pytest.mark.parametrize("unit", [0.01, 0.37, 5.0])
    def test_metric(self, unit: float) -> None:
        """M by autograd, in the mean of the latents; a scale moves by its zone's mean gradient."""
        latent = torch.tensor(
            [[1.0, 0.5, 0.2, -0.1], [0.01, -0.02, 0.3, -0.7]], dtype=torch.float64
        )
        gradient = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 4)
        c = torch.tensor(unit, dtype=torch.float64)
        pulled = pull_back_ternary(gradient, latent, c, *self.scales, 0.05)
        jacobian = torch.autograd.functional.jacobian(
            lambda u: c * TernaryStraightThrough.apply(u, *self.scales, 0.05), latent
        )
        changes = jacobian.square().sum(dim=(0, 1))
        _, metric = gradient_and_metric(pulled["latent"])
        assert float(metric) == pytest.approx(float(changes.mean()))
        assert float(gradient_and_metric(pulled["scale_pos"])[1]) == pytest.approx(unit**2 * 4)
        assert float(gradient_and_metric(pulled["scale_neg"])[1]) == pytest.approx(unit**2 * 2)
        assert float(pulled["scale_pos"][0]) == pytest.approx((1 + 2 + 3 + 7) / 4 / unit)
        assert float(pulled["scale_neg"][0]) == pytest.approx(-(4 + 8) / 2 / unit)


def test_registry() -> None:
    assert set(QUANTIZERS) == {"binary", "ternary", "uniform"}

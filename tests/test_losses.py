"""MultiClassHingeLoss against loops over samples and classes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfw_opt import MultiClassHingeLoss


def by_loops(scores: Tensor, targets: Tensor, smooth: bool) -> tuple[float, Tensor]:
    """Mean over samples of Σ_y ξ_y (s_y + 1[y ≠ ȳ] − s_ȳ), and its gradient with ξ held fixed."""
    count, classes = scores.shape
    loss, gradient = 0.0, torch.zeros_like(scores)
    for i in range(count):
        s, target = scores[i].tolist(), int(targets[i])
        aug = [s[y] + (y != target) - s[target] for y in range(classes)]
        hard = [0.0] * classes
        hard[max(range(classes), key=lambda y: aug[y])] = 1.0
        xi = hard
        if smooth:
            largest = max(s)
            weights = [math.exp(value - largest) for value in s]
            xi = [weight / sum(weights) for weight in weights]
            if sum(x * a for x, a in zip(xi, aug, strict=True)) < 0:
                xi = hard
        loss += sum(x * a for x, a in zip(xi, aug, strict=True)) / count
        for y in range(classes):
            gradient[i, y] += xi[y] / count
        gradient[i, target] -= sum(xi) / count
    return loss, gradient


@pytest.mark.parametrize("smooth", [False, True])
@given(
    count=st.integers(1, 6),
    classes=st.integers(2, 7),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_value_and_gradient(
    smooth: bool, count: int, classes: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (count,), generator=generator)
    expected, gradient = by_loops(scores, targets, smooth)
    scores.requires_grad_()
    loss = MultiClassHingeLoss(smooth=smooth)(scores, targets)
    loss.backward()
    assert loss.dim() == 0
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    assert float(loss.detach()) >= 0.0
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, gradient)


def test_hard_loss_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.5], [4.0, 0.0, 0.0]])
    loss = MultiClassHingeLoss()(scores, torch.tensor([2, 0]))
    # (3 + 1 − 2.5) for the first; the second has margin 4 ≥ 1.
    assert float(loss) == pytest.approx(1.5 / 2)


def test_correct_by_a_margin_is_zero() -> None:
    """Loss and gradient are exactly zero: the step stops by itself."""
    scores = torch.tensor([[5.0, 1.0], [0.0, 3.0]], requires_grad=True)
    loss = MultiClassHingeLoss()(scores, torch.tensor([0, 1]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(2, 2))


def test_smooth_falls_back_for_each_sample() -> None:
    """Where the softmax sum is negative the argmax takes over, sample by sample."""
    scores = torch.tensor([[2.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([0, 0])
    # First: aug = (0, −0.5), Σ ξ·aug < 0, argmax gives 0. Second: aug = (0, 1), ξ = (½, ½).
    assert float(MultiClassHingeLoss(smooth=True)(scores, targets)) == pytest.approx(0.25)


def test_smooth_is_a_lower_bound_of_the_hard_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 10, generator=generator)
    targets = torch.randint(0, 10, (50,), generator=generator)
    smooth = float(MultiClassHingeLoss(smooth=True)(scores, targets))
    assert 0 < smooth <= float(MultiClassHingeLoss()(scores, targets))


@pytest.mark.parametrize("smooth", [False, True])
def test_no_gradient_through_the_dual_vertex(smooth: bool) -> None:
    """ξ is detached: the second derivative is zero even where ξ is a softmax."""
    scores = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    loss = MultiClassHingeLoss(smooth=smooth)(scores, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    if gradient.requires_grad:
        (second,) = torch.autograd.grad(gradient.sum(), scores, allow_unused=True)
        assert second is None or not second.any()


def test_settings_belong_to_the_instance() -> None:
    scores, targets = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    smooth, hard = MultiClassHingeLoss(smooth=True), MultiClassHingeLoss()
    assert float(smooth(scores, targets)) == pytest.approx(0.5)
    assert float(hard(scores, targets)) == pytest.approx(1.0)
    assert isinstance(hard, torch.nn.Module)
    assert "smooth=True" in repr(smooth)
    assert not list(hard.parameters())


@pytest.mark.parametrize("smooth", [False, True])
def test_large_scores_stay_finite(smooth: bool) -> None:
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = MultiClassHingeLoss(smooth=smooth)(scores, torch.tensor([1, 1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((2e4 + 1) / 2)
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
def test_low_precision_scores(dtype: torch.dtype, smooth: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 5, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 5, (8,), generator=generator)
    loss = MultiClassHingeLoss(smooth=smooth)(scores, targets)
    loss.backward()
    expected, _ = by_loops(scores.detach().double(), targets, smooth)
    assert float(loss.detach()) == pytest.approx(expected, rel=0.02)
    assert scores.grad is not None
    assert scores.grad.dtype == dtype


@pytest.mark.parametrize(
    ("scores", "targets"),
    [
        pytest.param(torch.zeros(3), torch.tensor([0, 1, 2]), id="scores of one dimension"),
        pytest.param(torch.zeros(3, 4), torch.tensor([0, 1]), id="too few targets"),
        pytest.param(torch.zeros(3, 4), torch.zeros(3, 4), id="one-hot targets"),
        pytest.param(torch.zeros(3, 4), torch.zeros(3), id="float targets"),
    ],
)
def test_bad_input(scores: Tensor, targets: Tensor) -> None:
    """What PyTorch would broadcast or index silently is an error."""
    with pytest.raises((ValueError, TypeError), match=r"targets|scores"):
        MultiClassHingeLoss()(scores, targets)

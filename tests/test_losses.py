"""MultiClassHingeLoss against loops over samples and classes."""

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
            weights = [math.exp(value - max(s)) for value in s]
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
    scale=st.sampled_from([0.1, 1.0, 5.0, 1e4]),
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
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert float(loss.detach()) >= 0.0
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, gradient)


def test_correct_by_a_margin_is_zero() -> None:
    """Loss and gradient are exactly zero: the step stops by itself."""
    scores = torch.tensor([[5.0, 1.0], [0.0, 3.0]], requires_grad=True)
    loss = MultiClassHingeLoss()(scores, torch.tensor([0, 1]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("smooth", [False, True])
def test_no_gradient_through_the_dual_vertex(smooth: bool) -> None:
    """ξ is detached: the second derivative is zero even where ξ is a softmax."""
    scores = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    loss = MultiClassHingeLoss(smooth=smooth)(scores, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    if gradient.requires_grad:
        (second,) = torch.autograd.grad(gradient.sum(), scores, allow_unused=True)
        assert second is None or not second.any()


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


def test_bad_input() -> None:
    """What PyTorch would broadcast or index silently is an error."""
    few, one_hot, floats = torch.tensor([0, 1]), torch.zeros(3, 4), torch.zeros(3)
    for scores, targets in ((floats, few), (one_hot, few), (one_hot, one_hot), (one_hot, floats)):
        with pytest.raises(ValueError, match=r"targets|scores"):
            MultiClassHingeLoss()(scores, targets)

"""Small real training: digits of scikit-learn, and problems whose answer is known."""

# torch leaves backward() and split() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import Parameter

from dfw_opt import (
    DFW,
    MultiClassHingeLoss,
    ProjectedDFW,
    SignActivation,
    TernaryDFW,
    param_groups,
)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,400 images of 8×8 to train on, 397 to test."""
    bunch = load_digits()
    images = torch.tensor(np.asarray(bunch.images), dtype=torch.float32)[:, None] / 16 - 0.3
    labels = torch.tensor(np.asarray(bunch.target))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def small_net(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        activation(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32),
        activation(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def accuracy_after(
    optimizer_class: Any,
    activation: type[nn.Module] = nn.ReLU,
    epochs: int = 4,
    criterion: nn.Module | None = None,
    **settings: Any,
) -> float:
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = small_net(activation)
    quantized = optimizer_class is not DFW
    params = param_groups(model) if quantized else model.parameters()
    optimizer = optimizer_class(params, **settings)
    criterion = MultiClassHingeLoss(smooth=True) if criterion is None else criterion
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(64):
            optimizer.zero_grad()
            loss = criterion(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step(loss=loss)
    if quantized:
        levels = 2 if optimizer_class is ProjectedDFW else 3
        for name in ("3.weight", "7.weight"):
            for channel in model.state_dict()[name]:
                assert len(set(channel.flatten().tolist())) <= levels
    model.eval()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


@pytest.mark.parametrize(
    ("optimizer", "activation", "goal"),
    [
        pytest.param(DFW, nn.ReLU, 0.96, id="float"),
        pytest.param(ProjectedDFW, nn.ReLU, 0.95, id="binary"),
        pytest.param(ProjectedDFW, SignActivation, 0.93, id="xnor"),
        pytest.param(TernaryDFW, nn.ReLU, 0.95, id="ternary"),
    ],
)
def test_digits(optimizer: Any, activation: type[nn.Module], goal: float) -> None:
    """With the default settings, untouched."""
    assert accuracy_after(optimizer, activation) >= goal


@pytest.mark.parametrize("optimizer", [DFW, ProjectedDFW, TernaryDFW])
def test_digits_with_cross_entropy(optimizer: Any) -> None:
    assert accuracy_after(optimizer, criterion=nn.CrossEntropyLoss()) >= 0.96


@pytest.mark.parametrize("optimizer", [ProjectedDFW, TernaryDFW])
def test_digits_closed_form(optimizer: Any) -> None:
    assert accuracy_after(optimizer, step_size="closed_form") >= 0.96


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("pos", "neg"), [(0.8, 0.2), (0.2, 0.8)])
def test_both_ternary_scales_find_their_level(foreach: bool, pos: float, neg: float) -> None:
    """A ternary teacher with unequal levels: a wrong sign of ∂W_n drives one level away from it."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, (8, 16), generator=generator)
    teacher = torch.where(signs > 0, pos, torch.where(signs < 0, -neg, 0.0))
    start = 0.5 * torch.randn(8, 16, generator=generator)
    p = Parameter(start)
    optimizer = TernaryDFW([p], lr=0.03, foreach=foreach)
    x = torch.randn(256, 16, generator=generator)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (x @ (p - teacher).t()).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    state = optimizer.state[p]
    unit = float(state["unit"])
    assert unit * float(state["scale_pos"]) == pytest.approx(pos, abs=0.05)
    assert unit * float(state["scale_neg"]) == pytest.approx(neg, abs=0.05)
    assert float((p.detach() - teacher).abs().max()) <= 0.05


@pytest.mark.parametrize("foreach", [False, True])
def test_binary_teacher(foreach: bool) -> None:
    """Signs and one magnitude a channel are found again from the loss alone."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (8, 16), generator=generator) * 2.0 - 1.0
    teacher = signs * torch.linspace(0.3, 0.6, 8)[:, None]
    p = Parameter(0.5 * torch.randn(8, 16, generator=generator))
    optimizer = ProjectedDFW([p], lr=0.1, foreach=foreach)
    x = torch.randn(256, 16, generator=generator)
    first = None
    for _ in range(400):
        optimizer.zero_grad()
        loss = (x @ (p - teacher).t()).square().mean()
        first = float(loss.detach()) if first is None else first
        loss.backward()
        optimizer.step(loss=loss)
    assert float((p.detach().sign() == signs).float().mean()) >= 0.97
    with torch.no_grad():
        assert float((x @ (p - teacher).t()).square().mean()) <= 0.1 * float(first or 0.0)


def test_interpolation_stops_by_itself() -> None:
    """Where the loss can reach 0, the Polyak length makes the steps vanish with it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 30, generator=generator)
    y = torch.randn(20, generator=generator)
    p = Parameter(torch.zeros(30))
    optimizer = DFW([p], lr=10.0, momentum=0.0, eps=0.0)
    for _ in range(500):
        optimizer.zero_grad()
        loss = (x @ p - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    assert float(loss.detach()) < 1e-6
    assert optimizer.gamma is not None
    assert 0.0 < float(optimizer.gamma) < 1.0


@pytest.mark.parametrize("width", [64, 4096])
@pytest.mark.parametrize("factor", [0.5, 1.2, 3.0])
def test_binary_scales_settle_where_no_norm_follows(factor: float, width: int) -> None:
    """A loss as harmless as half the squared distance, of which only the scales are off.

    A floor under the loss keeps γ near 1, so that nothing but `lr` bounds the steps.
    """
    torch.manual_seed(0)
    p = Parameter(torch.randn(8, width) / width**0.5)
    optimizer = ProjectedDFW([p])
    target = factor * p.detach()
    for _ in range(80):
        p.grad = p.detach() - target
        loss = p.grad.square().sum() / 2
        optimizer.step(loss=loss + 10)
    assert float(loss) < 1e-2 * float(target.square().sum() / 2)
    assert float(((p >= 0) != (target >= 0)).float().mean()) < 0.01

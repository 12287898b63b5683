"""Layers that binarize their own weights, as people have them, under ProjectedDFW(quantizer=None).

The layers are written here the way they are usually found, in three styles; the parameter is the
latent weight, and the optimizer keeps it in a box.
"""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATHS, same_bits
from test_training import digits
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import conv2d, linear

from dfw_opt import (
    DFW,
    MultiClassHingeLoss,
    ProjectedDFW,
    load_packed,
    param_groups,
    save_packed,
    summary,
)


class Binarize(torch.autograd.Function):
    """Sign, with the gradient of a clipped identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = grads[0] * (x.abs() <= 1)
        return passed


def binarize(x: Tensor) -> Tensor:
    result: Tensor = Binarize.apply(x)
    return result


def per_channel(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.dim())), keepdim=True)


class BinaryConv2d(nn.Conv2d):
    """A detached scale, and the sign as an autograd function."""

    def binary_weight(self) -> Tensor:
        return per_channel(self.weight.abs()).detach() * binarize(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(binarize(x), self.binary_weight(), self.bias, self.stride, self.padding)


class BinaryLinear(nn.Linear):
    def binary_weight(self) -> Tensor:
        return per_channel(self.weight.abs()).detach() * binarize(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(binarize(x), self.binary_weight(), self.bias)


class BiRealConv2d(BinaryConv2d):
    """As with Bi-Real Net: the hard weight in the value, a clipped one in the gradient."""

    def binary_weight(self) -> Tensor:
        hard = per_channel(self.weight.abs()) * torch.where(self.weight >= 0, 1.0, -1.0)
        soft = self.weight.clamp(-1.0, 1.0)
        return hard.detach() - soft.detach() + soft


class IRConv2d(BinaryConv2d):
    """As with IR-Net: weights standardised first, and a scale that is a power of two."""

    def binary_weight(self) -> Tensor:
        w = self.weight - per_channel(self.weight)
        w = w / w.flatten(1).std(dim=1).reshape(-1, 1, 1, 1)
        scale = 2.0 ** per_channel(w.abs()).log2().round().detach()
        return scale * binarize(w)


LAYERS = (BinaryConv2d, BinaryLinear)


def make_net(conv: Callable[..., nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        conv(16, 32, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32),
        conv(32, 32, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32),
        nn.Flatten(),
        BinaryLinear(128, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.Linear(64, 10),
    )


def binary_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def make_optimizer(model: nn.Module, radius: float | None = 1.0, **settings: Any) -> ProjectedDFW:
    latents = [layer.weight for layer in binary_layers(model)]
    ids = {id(p) for p in latents}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": latents}, {"params": others, "radius": None}]
    return ProjectedDFW(groups, quantizer=None, radius=radius, **settings)


def fit(
    model: nn.Module,
    optimizer: Any,
    epochs: int = 4,
    after_backward: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    x, y, _, _ = digits()
    criterion = MultiClassHingeLoss(smooth=True)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(64):
            loss = criterion(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            after_backward()
            optimizer.step(loss=loss)
            after_step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    _, _, x, y = digits()
    return float((model.eval()(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("radius", [1.0, 0.05])
@pytest.mark.parametrize("conv", [BinaryConv2d, BiRealConv2d, IRConv2d])
def test_learns_the_digits(conv: type[nn.Module], radius: float) -> None:
    """With all else at its default; latents never leave the box, and are what the layers hold."""
    torch.manual_seed(0)
    model = make_net(conv)
    layers = binary_layers(model)
    params = list(model.parameters())
    signs = [layer.weight.detach() >= 0 for layer in layers]
    optimizer = make_optimizer(model, radius)
    bound = torch.tensor(radius)  # in float32, as the weights are
    at_bound = 0

    def look() -> None:
        nonlocal at_bound
        for layer in layers:
            assert (layer.weight.detach().abs() <= bound).all()
            at_bound += int((layer.weight.detach().abs() == bound).sum())

    look()
    before = accuracy(model)
    fit(model, optimizer, after_step=look)
    assert before < 0.3
    assert accuracy(model) > 0.9
    assert int(optimizer.skipped_steps) == 0

    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    for layer, sign in zip(layers, signs, strict=True):
        assert set(optimizer.state[layer.weight]) == {"momentum_buffer"}
        # The latent is a float; the layer makes two values a channel of it, others than at first.
        assert layer.weight.unique().numel() > 1000 or radius == 0.05
        for channel in layer.binary_weight():
            # The detached style is a sum of three, so it rounds.
            assert channel.detach().mul(2**12).round().unique().numel() <= 2
        assert ((layer.weight >= 0) != sign).float().mean() > 0.005
    assert at_bound > 1000 or radius == 1.0


@pytest.mark.parametrize("path", PATHS)
def test_the_exact_step_in_the_box(path: str) -> None:
    """γ counts on what is held at the bound: it reaches a linearised loss of zero; next tests."""
    weight = Parameter(torch.tensor([[0.9, 0.0]]))
    optimizer = ProjectedDFW(
        [weight], lr=0.5, momentum=0.0, eps=0.0, quantizer=None, radius=1.0, **PATHS[path]
    )
    weight.grad = torch.tensor([[-2.0, 1.0]])
    before = weight.detach().clone()
    optimizer.step(loss=0.5)
    assert float(optimizer.gamma) == pytest.approx(0.6)
    assert weight.tolist()[0] == pytest.approx([1.0, -0.3])
    assert 0.5 + float((weight.grad * (weight.detach() - before)).sum()) == pytest.approx(0.0)


class TestWhatNotToDo:
    def test_clamping_by_hand(self) -> None:
        """The step believes in a way that the clamp takes back: it stops too early."""
        weight = Parameter(torch.tensor([[0.9, 0.0]]))
        optimizer = DFW([weight], lr=0.5, momentum=0.0, eps=0.0)
        weight.grad = torch.tensor([[-2.0, 1.0]])
        before = weight.detach().clone()
        optimizer.step(loss=0.5)
        weight.data.clamp_(-1.0, 1.0)
        assert float(optimizer.gamma) == pytest.approx(0.2)
        # The box's own step has γ = 0.6, and leaves nothing of the linearised loss.
        assert 0.5 + float((weight.grad * (weight.detach() - before)).sum()) == pytest.approx(0.2)

    def test_clamping_at_the_same_radius_does_nothing(self) -> None:
        """Left over from the old loop, it is harmless."""
        outcomes = []
        for by_hand in (False, True):
            torch.manual_seed(0)
            model = make_net(BinaryConv2d)
            layers = binary_layers(model)

            def clamp(layers: list[Any] = layers, by_hand: bool = by_hand) -> None:
                for layer in layers if by_hand else ():
                    layer.weight.data.clamp_(-0.05, 0.05)

            fit(model, make_optimizer(model, 0.05), epochs=1, after_step=clamp)
            outcomes.append([p.detach() for p in model.parameters()])
        assert all(same_bits(p, q) for p, q in zip(*outcomes, strict=True))

    @pytest.mark.parametrize("factor", [288.0, 1e9])
    def test_multiplying_the_gradient(self, factor: float) -> None:
        """By n or 1e9, as XNOR-Net code does: γ falls by the square, for all parameters at once."""
        torch.manual_seed(0)
        start = make_net(BinaryConv2d)
        x, y, _, _ = digits()
        gammas, steps, squares = [], [], []
        for scale in (1.0, factor):
            model = copy.deepcopy(start)
            optimizer = make_optimizer(model, lr=1.0, momentum=0.0, eps=0.0)
            loss = MultiClassHingeLoss(smooth=True)(model(x[:64]), y[:64])
            loss.backward()
            latents = [layer.weight for layer in binary_layers(model)]
            for weight in latents:
                assert weight.grad is not None
                weight.grad *= scale
            squares.append(
                sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
            )
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step(loss=loss)
            gammas.append(float(optimizer.gamma))
            moved = [
                (p.detach() - q).norm() for p, q in zip(model.parameters(), before, strict=True)
            ]
            steps.append(float(torch.stack(moved)[0]))  # of the first layer, which is float
        assert 0 < gammas[1] < gammas[0] < 1
        assert gammas[1] / gammas[0] == pytest.approx(squares[0] / squares[1], rel=1e-3)
        assert steps[1] < 1e-2 * steps[0]

    def test_nothing_is_learnt_at_1e9(self) -> None:
        """Not one sign changes in an epoch, and the float layers are as they were."""
        torch.manual_seed(0)
        model = make_net(BinaryConv2d)
        latents = [layer.weight for layer in binary_layers(model)]
        signs = [w.detach() >= 0 for w in latents]
        first_layer: Any = model[0]
        first = first_layer.weight.detach().clone()
        optimizer = make_optimizer(model)

        def scale() -> None:
            for weight in latents:
                assert weight.grad is not None
                weight.grad *= 1e9

        fit(model, optimizer, epochs=1, after_backward=scale)
        assert float(optimizer.gamma) < 1e-12
        assert all(torch.equal(w >= 0, sign) for w, sign in zip(latents, signs, strict=True))
        torch.testing.assert_close(first_layer.weight, first, rtol=1e-4, atol=1e-6)
        assert accuracy(model) < 0.3

    def test_adam_does_not_notice(self) -> None:
        """Which is why such factors are in the code."""
        outcomes = []
        for scale in (1.0, 1e9):
            p = Parameter(torch.linspace(-1, 1, 6))
            optimizer = torch.optim.Adam([p], lr=0.01)
            for _ in range(5):
                optimizer.zero_grad()
                p.sub(0.3).square().sum().backward()
                assert p.grad is not None
                p.grad *= scale
                optimizer.step()
            outcomes.append(p.detach())
        torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)


class TestSwapIn:
    """The other usual style: the loop puts binary weights into plain layers, and takes them out."""

    @staticmethod
    @contextmanager
    def binary(weights: list[Tensor]) -> Iterator[None]:
        latents = [w.detach().clone() for w in weights]
        for w in weights:
            w.data.copy_(per_channel(w.data.abs()) * torch.where(w.data >= 0, 1.0, -1.0))
        yield
        for w, latent in zip(weights, latents, strict=True):
            w.data.copy_(latent)

    def test_restored_before_the_step(self) -> None:
        torch.manual_seed(0)
        model = make_net(nn.Conv2d)
        weights: list[Any] = [model[2].weight, model[5].weight]
        x, y, x_test, y_test = digits()
        others = [p for p in model.parameters() if all(p is not w for w in weights)]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "radius": None}]
        optimizer = ProjectedDFW(groups, quantizer=None)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for batch in torch.randperm(len(y), generator=generator).split(64):
                optimizer.zero_grad()
                with self.binary(weights):
                    loss = MultiClassHingeLoss(smooth=True)(model(x[batch]), y[batch])
                    loss.backward()
                optimizer.step(loss=loss)
                assert all((w.detach().abs() <= 1).all() for w in weights)
        model.eval()
        with self.binary(weights), torch.no_grad():
            assert all(len(channel.unique()) <= 2 for w in weights for channel in w)
            assert float((model(x_test).argmax(1) == y_test).float().mean()) > 0.9


class TestAround:
    """Checkpoints, sizes, and the way to layers that are plain."""

    def trained(self, conv: Callable[..., nn.Module] = BinaryConv2d) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = make_net(conv)
        optimizer = make_optimizer(model)
        fit(model, optimizer, epochs=1)
        return model, optimizer

    def test_checkpoint(self) -> None:
        """The model's state_dict has the latents, the optimizer's the momentum: both resume."""
        model, optimizer = self.trained()
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        torch.manual_seed(7)
        other = make_net(BinaryConv2d)
        other.load_state_dict(weights)
        resumed = make_optimizer(other)
        resumed.load_state_dict(state)
        fit(model, optimizer, epochs=1)
        fit(other, resumed, epochs=1)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert same_bits(p, q)

    def test_packed(self, tmp_path: Path) -> None:
        """Once the layers' binary weights are written into them, they are packed as such."""
        model, _ = self.trained()
        names = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}

        def packed_as_binary() -> set[str]:
            return {layer.name for layer in summary(model).layers if layer.encoding == "binary"}

        assert not packed_as_binary()
        scores = model.eval()(digits()[2][:20])
        with torch.no_grad():
            for layer in binary_layers(model):
                layer.weight.copy_(layer.binary_weight())
        torch.testing.assert_close(model(digits()[2][:20]), scores)
        assert packed_as_binary() == names
        save_packed(model, tmp_path / "net.dfw")
        other = make_net(BinaryConv2d)
        load_packed(other, tmp_path / "net.dfw")
        assert torch.equal(other.eval()(digits()[2][:20]), model(digits()[2][:20]))

    def test_param_groups_would_quantize_them_again(self) -> None:
        """The layers are Conv2d and Linear, so it takes their latents for weights of plain ones."""
        model = make_net(BinaryConv2d)
        quantized, _ = param_groups(model)
        chosen = {id(p) for p in quantized["params"]}
        assert chosen == {id(layer.weight) for layer in binary_layers(model)}

"""The baselines' layers: values, gradients, clipping, and that they start like everything else."""

import pytest
import torch
from resnet20 import nets, straight_through
from resnet20.straight_through import BinaryConv2d, StraightThroughConv2d, TernaryConv2d
from torch import Tensor, nn

from dfw_opt import TernaryDFW, param_groups


def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 3, 2, 1, bias=False).double()


def weight_gradient(layer: StraightThroughConv2d, gradient: Tensor) -> Tensor:
    """The gradient at the latent when that at the quantized weight is ``gradient``."""
    layer.zero_grad()
    (layer.quantized() * gradient).sum().backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    return layer.weight.grad


def test_binary_values() -> None:
    layer = BinaryConv2d.replacing(conv())
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 0.0
    latent = layer.weight.detach()
    for channel, quantized in zip(latent, layer.quantized().detach(), strict=True):
        sign = torch.where(channel >= 0, 1.0, -1.0).double()
        torch.testing.assert_close(quantized, channel.abs().mean() * sign)


def test_binary_gradient_is_autograds_with_an_identity_for_the_sign() -> None:
    layer = BinaryConv2d.replacing(conv())
    gradient = torch.randn_like(layer.weight)
    latent = layer.weight.detach().clone().requires_grad_()
    # The value of the sign, the derivative of the identity; alpha is left to autograd.
    sign = latent + (latent.sign() - latent).detach()
    (latent.abs().mean((1, 2, 3), keepdim=True) * sign * gradient).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight_gradient(layer, gradient), latent.grad)


def test_ternary_values_and_gradients_by_hand() -> None:
    layer = TernaryConv2d(1, 1, (1, 5), bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 0.05, -0.08, -1.0, 0.4]))
    layer.start()
    # Normalised by 2; the threshold is then 0.05.
    torch.testing.assert_close(
        layer.weight.detach().flatten(), torch.tensor([1.0, 0.025, -0.04, -0.5, 0.2]).double()
    )
    assert layer.scale_pos.item() == pytest.approx(0.6)
    assert layer.scale_neg.item() == pytest.approx(0.5)
    torch.testing.assert_close(
        layer.quantized().detach().flatten(), torch.tensor([0.6, 0, 0, -0.5, 0.6]).double()
    )
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double().view(1, 1, 1, 5)
    torch.testing.assert_close(
        weight_gradient(layer, gradient).flatten(),
        torch.tensor([0.6 * 1, 2, 3, 0.5 * 4, 0.6 * 5]).double(),
    )
    assert layer.scale_pos.grad is not None
    assert layer.scale_neg.grad is not None
    assert layer.scale_pos.grad.item() == (1 + 5) / 2
    assert layer.scale_neg.grad.item() == -4


def test_scale_gradients_are_finite_differences_over_the_size_of_the_zone() -> None:
    layer = TernaryConv2d.replacing(conv())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def loss() -> Tensor:
        y: Tensor = layer(x)
        return y.square().mean() + y.sum()

    loss().backward()  # type: ignore[no-untyped-call]
    zone = straight_through.ternary_zone(layer.weight)
    for scale, side in ((layer.scale_pos, zone > 0), (layer.scale_neg, zone < 0)):
        assert scale.grad is not None
        step = 1e-6
        with torch.no_grad():
            scale.add_(step)
            above = loss()
            scale.sub_(2 * step)
            below = loss()
            scale.add_(step)
        slope = ((above - below) / (2 * step)).item()
        assert scale.grad.item() * int(side.sum()) == pytest.approx(slope, rel=1e-6)


def test_stride_and_padding_are_those_of_the_convolution() -> None:
    plain = nn.Conv2d(3, 5, 3, 2, 1, bias=False)
    x = torch.randn(2, 3, 9, 9)
    layer = BinaryConv2d.replacing(plain)
    plain.weight = nn.Parameter(layer.quantized().detach())
    torch.testing.assert_close(layer(x), plain(x))


def test_clip() -> None:
    layer = TernaryConv2d.replacing(nn.Conv2d(2, 2, 3, bias=False))
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-3, 3, layer.weight.numel()).view_as(layer.weight))
        layer.scale_neg.fill_(-2.0)
        layer.scale_pos.fill_(2.0)
    inside = layer.weight.abs() <= 1
    before = layer.weight.detach().clone()
    layer.clip()
    assert layer.weight.min().item() == -1
    assert layer.weight.max().item() == 1
    assert torch.equal(layer.weight[inside], before[inside])
    assert layer.scale_neg.item() == pytest.approx(straight_through.SCALE_MIN)
    assert layer.scale_pos.item() == 2.0


def test_layer_of_zeros_stays_finite() -> None:
    plain = nn.Conv2d(2, 2, 3, bias=False)
    nn.init.zeros_(plain.weight)
    layer = TernaryConv2d.replacing(plain)
    assert torch.equal(layer.quantized(), torch.zeros_like(layer.weight))
    assert torch.equal(weight_gradient(layer, torch.ones_like(layer.weight)), layer.weight + 1)


@pytest.mark.parametrize("net", ["xnor", "ternary"])
def test_convert_takes_what_param_groups_takes(net: str) -> None:
    model = nets.build(net, "resnet", 0)
    quantized = {id(p) for p in param_groups(model)[0]["params"]}
    straight_through.convert(model.blocks, BinaryConv2d)
    layers = straight_through.layers(model)
    assert {id(layer.weight) for layer in layers} == quantized
    assert len(layers) == 18


def test_ternary_start_is_that_of_the_optimizer() -> None:
    ours, baseline = nets.build("ternary", "resnet", 3), nets.build("ternary", "resnet", 3)
    groups = param_groups(ours)
    optimizer = TernaryDFW(groups)
    straight_through.convert(baseline.blocks, TernaryConv2d)
    weights = groups[0]["params"]
    for layer, p in zip(straight_through.layers(baseline), weights, strict=True):
        assert isinstance(layer, TernaryConv2d)
        state = optimizer.state[p]
        torch.testing.assert_close(layer.weight.detach(), state["latent"])
        torch.testing.assert_close(layer.scale_pos.detach(), state["scale_pos"])
        torch.testing.assert_close(layer.scale_neg.detach(), state["scale_neg"])
        # The same up to the factor that BatchNorm takes out again.
        torch.testing.assert_close(layer.quantized().detach() * state["unit"], p.detach())

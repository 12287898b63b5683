"""The networks of the example, and that every optimizer trains every one of them."""

import itertools
import math

import pytest
import torch
from resnet20 import data, nets
from resnet20.data import Data
from resnet20.nets import SHORTCUTS, ResNet20
from resnet20.optimizers import OPTIMIZERS
from resnet20.settings import Settings
from resnet20.straight_through import TernaryConv2d, layers
from resnet20.training import Run
from torch import nn

from dfw_opt import SignActivation

NETS = nets.NETS
OURS = [name for name in OPTIMIZERS if name != "parq"]  # which has its own tests


@pytest.fixture(scope="module")
def digits() -> Data:
    return data.load(None, limit=64)


def choose(**given: object) -> Settings:
    return Settings.choose({"device": "cpu", "amp": "off", "batch_size": 16, **given})


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shortcuts", SHORTCUTS)
def test_parameter_count(shortcuts: str) -> None:
    for net in ("float", "binary", "ternary"):
        assert parameters(nets.build(net, shortcuts, 0)) == 269_722
    # Norms come before the convolutions, on their inputs, and one more before the pooling.
    assert parameters(nets.build("xnor", shortcuts, 0)) == 269_722 + 2 * (64 - 16 - 32)


def test_layers() -> None:
    model = nets.build("float", "resnet", 0)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 19
    assert [m.stride for m in convolutions].count((2, 2)) == 2
    assert all(m.bias is None for m in convolutions)
    xnor = nets.build("xnor", "resnet", 0)
    assert sum(isinstance(m, SignActivation) for m in xnor.modules()) == 18


def test_shortcut_is_option_a() -> None:
    x = torch.randn(2, 16, 8, 8)
    assert nets.shortcut(x, 16, 1) is x
    y = nets.shortcut(x, 32, 2)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("bireal", [False, True])
def test_shortcuts_go_where_they_should(signs: bool, bireal: bool) -> None:
    """With convolutions that give nothing, what is left of a block is its shortcuts."""
    model = ResNet20(signs, bireal).eval()
    block = model.blocks[3]  # from 16 to 32 channels, stride 2
    x = torch.randn(2, 16, 8, 8)
    around = nets.shortcut(x, 32, 2)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if "conv" in name:
                p.zero_()
        torch.testing.assert_close(block(x), around if signs else around.relu())
        # Only a shortcut of its own carries the image past the first convolution to the second.
        seen: list[torch.Tensor] = []
        conv2 = block.get_submodule("conv2")
        handle = conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        block(x)
        handle.remove()
        assert (len(levels(seen[0])) > 1) == bireal


def levels(values: torch.Tensor) -> set[float]:
    return set(values.detach().flatten().tolist())


@pytest.mark.parametrize("net", NETS)
def test_signs_reach_the_inner_convolutions_of_xnor_alone(net: str) -> None:
    model = nets.build(net, "resnet", 0)
    binary: list[bool] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        binary.append(levels(inputs[0]) == {-1, 1})

    for module in model.blocks.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    model(torch.randn(2, 3, 32, 32))
    assert binary == [net == "xnor"] * 18


def test_same_seed_same_weights() -> None:
    def weights(net: str, seed: int) -> list[torch.Tensor]:
        model = nets.build(net, "resnet", seed)
        return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    for net in NETS:
        pairs = zip(weights(net, 7), weights("float", 7), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(weights("float", 7)[3], weights("float", 8)[3])


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    nets.build("float", "resnet", 0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("net", "optimizer", "shortcuts"), [*itertools.product(NETS, OURS, SHORTCUTS)]
)
def test_every_combination_takes_a_step(
    net: str, optimizer: str, shortcuts: str, digits: Data
) -> None:
    run = Run(choose(net=net, optimizer=optimizer, shortcut=shortcuts, epochs=1), digits)
    before = [p.detach().clone() for p in run.model.parameters()]
    images, labels = next(run.augmenter.epoch(0, 0, 16))
    loss, _ = run.train_step(images, labels)
    assert math.isfinite(float(loss))
    moved = [
        not torch.equal(p.detach(), old)
        for p, old in zip(run.model.parameters(), before, strict=True)
    ]
    # A binary weight need not flip in one step, but its scale moves.
    assert all(moved)
    quantized = [m for m in run.model.blocks.modules() if isinstance(m, nn.Conv2d)]
    if optimizer == "dfw":
        assert all(type(m) is nn.Conv2d for m in quantized)
        values = [m.weight.detach() for m in quantized]
    else:
        values = [layer.quantized().detach() for layer in layers(run.model)] or [
            m.weight.detach() for m in quantized
        ]
    for value in values:
        count = len(levels(value))
        if net == "float":
            assert count > value.numel() / 2
        elif net == "ternary":
            assert count == 3
        else:
            assert all(len(levels(channel.abs())) == 1 for channel in value)


@pytest.mark.parametrize(("net", "optimizer"), [*itertools.product(NETS, OURS)])
def test_loss_goes_down_on_one_batch(net: str, optimizer: str, digits: Data) -> None:
    run = Run(choose(net=net, optimizer=optimizer, epochs=1), digits)
    images, labels = next(run.augmenter.epoch(0, 0, 16))
    losses = [float(run.train_step(images, labels)[0]) for _ in range(25)]
    assert sum(losses[-3:]) / 3 < 0.88 * losses[0]


def test_weight_decay_is_for_float_weights_alone(digits: Data) -> None:
    for net, optimizer in itertools.product(("xnor", "ternary"), OURS):
        run = Run(choose(net=net, optimizer=optimizer, weight_decay=0.25), digits)
        inner = {id(m.weight) for m in run.model.blocks.modules() if isinstance(m, nn.Conv2d)}
        for layer in layers(run.model):
            if isinstance(layer, TernaryConv2d):
                inner |= {id(layer.scale_pos), id(layer.scale_neg)}
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.0 if id(p) in inner else 0.25)

"""ResNet-20, Wide ResNet and DenseNet for CIFAR, of plain float layers.

The optimizer quantizes the convolutions in `blocks`; the first one and the linear layer stay float.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dfw_opt import SignActivation

WIDTHS = (16, 32, 64)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Network(nn.Module):
    """A first convolution, blocks, what follows the last of them, a mean over pixels, a layer."""

    def __init__(self, first: nn.Module, blocks: list[nn.Module], last: nn.Module, width: int):
        super().__init__()
        self.first, self.blocks, self.last = first, nn.Sequential(*blocks), last
        self.linear = nn.Linear(width, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.first(x))).mean((2, 3))
        # The loss decides the step size, so the scores are not rounded to bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            scores: Tensor = self.linear(x.float())
        return scores


class Block(nn.Module):
    """Twice convolution, BatchNorm, ReLU (He et al. 2016); or BatchNorm, sign, convolution.

    With ``bireal`` each convolution has its own shortcut (Liu et al. 2018), else each pair.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, signs: bool, bireal: bool) -> None:
        super().__init__()
        self.outputs, self.stride, self.bireal = outputs, stride, bireal
        conv1, conv2 = conv3x3(inputs, outputs, stride), conv3x3(outputs, outputs)
        if signs:  # XNOR-Net, Rastegari et al. 2016
            self.half1 = nn.Sequential(nn.BatchNorm2d(inputs), SignActivation(), conv1)
            self.half2 = nn.Sequential(nn.BatchNorm2d(outputs), SignActivation(), conv2)
        else:
            self.half1 = nn.Sequential(conv1, nn.BatchNorm2d(outputs))
            self.half2 = nn.Sequential(conv2, nn.BatchNorm2d(outputs))
        self.end = nn.Identity() if signs else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        around = shortcut(x, self.outputs, self.stride)
        y = self.half1(x)
        y = self.end(y + around if self.bireal else y)
        z: Tensor = self.end(self.half2(y) + (y if self.bireal else around))
        return z


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A of the paper, which has no parameters: take every other pixel, pad with zeros."""
    if stride == 1:
        return x
    missing = channels - x.shape[1]
    return pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, missing // 2, missing - missing // 2))


def resnet20(signs: bool, bireal: bool) -> Network:
    """Nineteen convolutions and a linear layer."""
    width = WIDTHS[0]
    first = nn.Sequential(conv3x3(3, width), *norm_relu(width))
    blocks: list[nn.Module] = []
    for i, outputs in enumerate(WIDTHS):
        for j in range(3):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(Block(width, outputs, stride, signs, bireal))
            width = outputs
    # The sum that leaves the last sign block has not been through a norm or a ReLU yet.
    return Network(first, blocks, norm_relu(width) if signs else nn.Identity(), width)


class WideBlock(nn.Module):
    """Two times BatchNorm, ReLU, convolution; where the shape changes, so does the shortcut's."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before = norm_relu(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.between = norm_relu(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        around: Tensor = x if self.shortcut is None else self.shortcut(y)
        z: Tensor = self.conv2(self.between(self.conv1(y)))
        return z + around


def wide_resnet(depth: int, factor: int) -> Network:
    """WRN-``depth``-``factor`` (Zagoruyko and Komodakis 2016)."""
    width = WIDTHS[0]
    blocks: list[nn.Module] = []
    for i, narrow in enumerate(WIDTHS):
        for j in range((depth - 4) // 6):
            blocks.append(WideBlock(width, narrow * factor, 2 if i > 0 and j == 0 else 1))
            width = narrow * factor
    return Network(conv3x3(3, WIDTHS[0]), blocks, norm_relu(width), width)


class DenseLayer(nn.Module):
    """Adds ``growth`` channels, made of all that there are through a 1x1 bottleneck."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.new = nn.Sequential(
            *norm_relu(inputs),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            *norm_relu(4 * growth),
            conv3x3(4 * growth, growth),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.new(x)), 1)


def densenet(depth: int, growth: int) -> Network:
    """DenseNet-BC-``depth``-``growth`` (Huang et al. 2017)."""
    width = 2 * growth
    blocks: list[nn.Module] = []
    for stage in range(3):
        if stage > 0:  # half the channels, height and width
            halve = nn.Conv2d(width, width // 2, 1, bias=False)
            blocks.append(nn.Sequential(*norm_relu(width), halve, nn.AvgPool2d(2)))
            width //= 2
        for _ in range((depth - 4) // 6):
            blocks.append(DenseLayer(width, growth))
            width += growth
    return Network(conv3x3(3, 2 * growth), blocks, norm_relu(width), width)


def build(net: str, shortcuts: str, seed: int, arch: str = "resnet20") -> Network:
    """The network called ``net``; with the same seed all of them start from the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == "wrn16-2":
            model = wide_resnet(16, 2)
        elif arch == "densenet28":
            model = densenet(28, 12)
        else:
            model = resnet20(net == "xnor", shortcuts == "bireal")
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

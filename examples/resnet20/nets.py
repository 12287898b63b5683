"""ResNet-20 for CIFAR (He et al. 2016), and the same with sign activations (XNOR-Net).

`build` makes it, or one of the other architectures.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfw_opt import SignActivation

from .data import CLASSES
from .dense import DenseNet
from .network import Network, conv3x3
from .wide import WideResNet

# What they are called here, and in papers. A step of the others takes a CPU about twice as long as
# one of ResNet-20.
ARCHES = {"resnet20": "ResNet-20", "wrn16-2": "WRN-16-2", "densenet28": "DenseNet-BC-28-12"}
NETS = ("float", "binary", "xnor", "ternary")
SHORTCUTS = ("resnet", "bireal")
_WIDTHS = (16, 32, 64)
_BLOCKS_PER_WIDTH = 3


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A of the paper, which has no parameters: take every other pixel, pad with zeros."""
    if stride == 1:
        return x
    missing = channels - x.shape[1]
    return functional.pad(
        x[:, :, ::stride, ::stride], (0, 0, 0, 0, missing // 2, missing - missing // 2)
    )


class Block(nn.Module):
    """Two times convolution, BatchNorm, ReLU.

    With ``bireal`` each convolution has its own shortcut (Liu et al. 2018), else each pair.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, bireal: bool) -> None:
        super().__init__()
        self.outputs, self.stride, self.bireal = outputs, stride, bireal
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        around = shortcut(x, self.outputs, self.stride)
        y = self.norm1(self.conv1(x))
        y = functional.relu(y + around if self.bireal else y, inplace=True)
        z = self.norm2(self.conv2(y)) + (y if self.bireal else around)
        return functional.relu(z, inplace=True)


class SignBlock(nn.Module):
    """Two times BatchNorm, sign, convolution, with no ReLU anywhere."""

    def __init__(self, inputs: int, outputs: int, stride: int, bireal: bool) -> None:
        super().__init__()
        self.outputs, self.stride, self.bireal = outputs, stride, bireal
        self.norm1 = nn.BatchNorm2d(inputs)
        self.sign1 = SignActivation()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.sign2 = SignActivation()
        self.conv2 = conv3x3(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        around = shortcut(x, self.outputs, self.stride)
        y: Tensor = self.conv1(self.sign1(self.norm1(x)))
        if self.bireal:
            y = y + around
        z: Tensor = self.conv2(self.sign2(self.norm2(y)))
        return z + (y if self.bireal else around)


class ResNet20(Network):
    """Nineteen 3x3 convolutions and a linear layer, all of them plain float layers of torch."""

    def __init__(self, signs: bool = False, bireal: bool = False) -> None:
        super().__init__()
        width = _WIDTHS[0]
        self.conv = conv3x3(3, width)
        self.norm = nn.BatchNorm2d(width)
        block = SignBlock if signs else Block
        blocks: list[nn.Module] = []
        for i, outputs in enumerate(_WIDTHS):
            for j in range(_BLOCKS_PER_WIDTH):
                blocks.append(block(width, outputs, 2 if i > 0 and j == 0 else 1, bireal))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        # The sum that leaves the last sign block has not been through a norm or a ReLU yet.
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()) if signs else nn.Identity()
        self.linear = nn.Linear(width, CLASSES)
        self.start()

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(functional.relu(self.norm(self.conv(x)), inplace=True))


def build(net: str, shortcuts: str, seed: int, arch: str = "resnet20") -> Network:
    """The network called ``net``; with the same seed all of them start from the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == "wrn16-2":
            model: Network = WideResNet(depth=16, factor=2)
        elif arch == "densenet28":
            model = DenseNet(depth=28, growth=12)
        else:
            model = ResNet20(signs=net == "xnor", bireal=shortcuts == "bireal")
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

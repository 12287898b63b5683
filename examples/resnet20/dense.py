"""A DenseNet-BC for CIFAR (Huang et al. 2017, arXiv 1608.06993)."""

import torch
from torch import Tensor, nn

from .data import CLASSES
from .network import Network, conv3x3, norm_relu

_STAGES = 3
_BOTTLENECK = 4  # times the growth
_COMPRESSION = 0.5


class DenseLayer(nn.Module):
    """Makes ``growth`` channels of all that were made so far, through a 1x1 bottleneck."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        middle = _BOTTLENECK * growth
        self.before1 = norm_relu(inputs)
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.before2 = norm_relu(middle)
        self.conv2 = conv3x3(middle, growth)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.before2(self.conv1(self.before1(x))))
        return torch.cat((x, y), 1)


def transition(inputs: int, outputs: int) -> nn.Sequential:
    """From one stage to the next: fewer channels, half the height and width."""
    return nn.Sequential(
        norm_relu(inputs), nn.Conv2d(inputs, outputs, 1, bias=False), nn.AvgPool2d(2)
    )


class DenseNet(Network):
    """DenseNet-BC with ``depth`` layers, each of which adds ``growth`` channels."""

    def __init__(self, depth: int, growth: int) -> None:
        super().__init__()
        width = 2 * growth
        self.conv = conv3x3(3, width)
        self.blocks = nn.Sequential()
        for stage in range(_STAGES):
            if stage > 0:
                narrow = int(width * _COMPRESSION)
                self.blocks.append(transition(width, narrow))
                width = narrow
            for _ in range((depth - 4) // 6):
                self.blocks.append(DenseLayer(width, growth))
                width += growth
        self.last = norm_relu(width)
        self.linear = nn.Linear(width, CLASSES)
        self.start()

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.conv(x))

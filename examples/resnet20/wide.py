"""A Wide ResNet for CIFAR (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from torch import Tensor, nn

from .data import CLASSES
from .network import Network, conv3x3, norm_relu

_WIDTHS = (16, 32, 64)


class WideBlock(nn.Module):
    """Two times BatchNorm, ReLU, convolution, and a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution, quantized like the others.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before1 = norm_relu(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.before2 = norm_relu(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before1(x)
        around: Tensor = x if self.shortcut is None else self.shortcut(y)
        z: Tensor = self.conv2(self.before2(self.conv1(y)))
        return z + around


class WideResNet(Network):
    """WRN-``depth``-``factor``: wider than ResNet-20 by the factor, and less deep."""

    def __init__(self, depth: int, factor: int) -> None:
        super().__init__()
        width = _WIDTHS[0]
        self.conv = conv3x3(3, width)
        self.blocks = nn.Sequential()
        for i, narrow in enumerate(_WIDTHS):
            for j in range((depth - 4) // 6):
                outputs = narrow * factor
                self.blocks.append(WideBlock(width, outputs, 2 if i > 0 and j == 0 else 1))
                width = outputs
        self.last = norm_relu(width)
        self.linear = nn.Linear(width, CLASSES)
        self.start()

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.conv(x))

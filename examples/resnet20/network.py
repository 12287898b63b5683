"""What the networks of the example have in common: a first and a last layer, and blocks between."""

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """The weights in ``blocks`` are quantized; ``conv`` and ``linear`` stay float."""

    conv: nn.Conv2d
    blocks: nn.Sequential
    last: nn.Module
    linear: nn.Linear

    def start(self) -> None:
        """Draw the weights of the convolutions (He et al. 2015)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def scores(self, x: Tensor) -> Tensor:
        """What follows the first convolution, with its norm if it has one."""
        x = self.last(self.blocks(x)).mean((2, 3))
        # The loss decides the step size, so the scores are not rounded to bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            scores: Tensor = self.linear(x.float())
        return scores


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """The convolution that all of them are made of."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def norm_relu(channels: int) -> nn.Sequential:
    """What stands before a convolution in the later architectures, and before the pooling."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

"""The networks of the paper's tables 4 and 5, and a small one for 8x8 digits."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class FullyConnected(nn.Module):
    """Flatten, then Linear layers with ReLU between: LeNet-300-100, LeNet-500-300.

    Args:
        widths: numbers of features from input to output, (784, 300, 100, 10).
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))

    def forward(self, input: Tensor) -> Tensor:
        """[batch, ...] with widths[0] features in all -> logits [batch, widths[-1]]."""
        features = input.flatten(1)
        for layer in self.layers[:-1]:
            features = F.relu(layer(features))
        logits: Tensor = self.layers[-1](features)
        return logits


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it: 20 and 50 5x5 convolutions without padding, 500 hidden features.

    Args:
        channels: of the two convolutions.
        hidden: features of the hidden Linear layer.
        classes: number of logits.
        size: height and width of the one-channel input.
    """

    def __init__(
        self, channels: tuple[int, int] = (20, 50), hidden: int = 500, classes: int = 10, size: int = 28
    ) -> None:
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(1, channels[0], 5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.fc1 = nn.Linear(channels[1] * side * side, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, input: Tensor) -> Tensor:
        """[batch, 1, size, size] -> logits [batch, classes]."""
        features = F.max_pool2d(F.relu(self.conv1(input)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(features.flatten(1))))
        return logits


class DigitsNet(nn.Module):
    """Two 3x3 convolutions with batch norm and two Linear layers for 8x8 grey images.

    Args:
        channels: of the two convolutions.
        hidden: features of the hidden Linear layer.
        classes: number of logits.
    """

    def __init__(self, channels: tuple[int, int] = (16, 32), hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels[1])
        self.fc1 = nn.Linear(channels[1] * 4, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, input: Tensor) -> Tensor:
        """[batch, 1, 8, 8] -> logits [batch, classes]."""
        features = F.max_pool2d(F.relu(self.bn1(self.conv1(input))), 2)
        features = F.max_pool2d(F.relu(self.bn2(self.conv2(features))), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(features.flatten(1))))
        return logits


def lenet_300_100(classes: int = 10) -> nn.Module:
    """784-300-100-10, Table 4."""
    return FullyConnected((784, 300, 100, classes))


def lenet_500_300(classes: int = 10) -> nn.Module:
    """784-500-300-10, Table 5."""
    return FullyConnected((784, 500, 300, classes))

"""Networks for 32 x 32 colour images: the paper's VGG-like network and the ResNets of CIFAR-10."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# 13 convolutions of VGG-16; "M" halves height and width
_VGG16: tuple[int | str, ...] = (
    64,
    64,
    "M",
    128,
    128,
    "M",
    256,
    256,
    256,
    "M",
    512,
    512,
    512,
    "M",
    512,
    512,
    512,
    "M",
)


class VGGCifar(nn.Module):
    """VGG-16 for CIFAR with batch norm and dropout, then 512 hidden features.

    As in the supplement of "Variational Bayesian Dropout": 13 convolutions with batch norm, each but the
    last of a block followed by dropout (0.3 in the first block, 0.4 in the others), a hidden layer between
    dropouts of 0.5.

    Args:
        classes: number of classes.
        width: multiplies all numbers of channels, rounded.
    """

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for place, item in enumerate(_VGG16):
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                continue
            count = max(1, round(item * width))
            layers += [nn.Conv2d(channels, count, 3, padding=1), nn.BatchNorm2d(count), nn.ReLU()]
            if _VGG16[place + 1] != "M":
                layers.append(nn.Dropout(0.3 if place == 0 else 0.4))
            channels = count
        self.features = nn.Sequential(*layers)
        hidden = max(1, round(512 * width))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(channels, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, classes),
        )

    def forward(self, input: Tensor) -> Tensor:
        """[batch, 3, 32, 32] -> logits [batch, classes]."""
        logits: Tensor = self.classifier(self.features(input).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: the identity, or a 1 x 1 convolution where the shape changes.

    Args:
        inputs, outputs: numbers of channels.
        stride: of the first convolution and the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, input: Tensor) -> Tensor:
        """[batch, inputs, h, w] -> [batch, outputs, h / stride, w / stride]."""
        features = F.relu(self.bn1(self.conv1(input)))
        return F.relu(self.bn2(self.conv2(features)) + self.shortcut(input))


class ResNetCifar(nn.Module):
    """ResNet for CIFAR (He et al. 2016): three stages of `blocks` basic blocks, 6 * blocks + 2 layers.

    Shortcuts that change the shape are 1 x 1 convolutions (their option B), so that every stream can lose
    channels.

    Args:
        blocks: in each stage: 3 for ResNet-20, 9 for ResNet-56.
        classes: number of classes.
        channels: of the three stages.
    """

    def __init__(self, blocks: int, classes: int = 10, channels: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[0])
        layers: list[nn.Module] = []
        before = channels[0]
        for stage, count in enumerate(channels):
            for block in range(blocks):
                layers.append(BasicBlock(before, count, 2 if stage and not block else 1))
                before = count
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(before, classes)

    def forward(self, input: Tensor) -> Tensor:
        """[batch, 3, 32, 32] -> logits [batch, classes]."""
        features = self.blocks(F.relu(self.bn(self.conv(input))))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def resnet20(classes: int = 10, channels: Sequence[int] = (16, 32, 64)) -> ResNetCifar:
    """ResNet-20 for CIFAR."""
    return ResNetCifar(3, classes, channels)


def resnet56(classes: int = 10, channels: Sequence[int] = (16, 32, 64)) -> ResNetCifar:
    """ResNet-56 for CIFAR."""
    return ResNetCifar(9, classes, channels)

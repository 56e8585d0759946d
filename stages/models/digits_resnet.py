"""A small residual network for the 8x8 digits: three convolutions, BatchNorm, one skip path."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity skip: relu(x + bn(conv(relu(bn(conv(x)))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, channels, H, W) from the same shape."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(out)))


class DigitsResNet(nn.Module):
    """8x8 image -> convolution -> residual block -> 4x4 by pooling -> hidden layer -> classes."""

    def __init__(self, num_classes: int, width: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.block = ResidualBlock(width)
        self.fc1 = nn.Linear(width * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes) for images (n, 1, 8, 8)."""
        x = self.block(torch.relu(self.bn1(self.conv1(x))))
        x = functional.max_pool2d(x, 2).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


def digits_resnet(num_classes: int, *, width: int = 12, hidden: int = 64) -> nn.Module:
    """Build the network: `width` channels, `hidden` units; 15,774 parameters with 10 classes."""
    return DigitsResNet(num_classes, width, hidden)

"""Residual networks in their CIFAR forms: a 3x3 first convolution with stride 1, no max pooling.

K. He et al., Deep Residual Learning, arXiv 1512.03385. Names follow torchvision: conv1, bn1,
layerI.J.{conv,bn}{1,2}, layerI.0.downsample.{0,1}, fc.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip path; a 1x1 convolution on it where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, channels, H / stride, W / stride) from (n, channels_in, H, W)."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.downsample(x))


class CifarResNet(nn.Module):
    """conv1 -> one stage of blocks for each width, halving the image between -> mean -> fc."""

    def __init__(self, num_classes: int, widths: Sequence[int], blocks: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = len(widths)
        channels = widths[0]
        for number, width in enumerate(widths, start=1):
            layer = nn.Sequential()
            for position in range(blocks):
                stride = 2 if number > 1 and position == 0 else 1
                layer.append(BasicBlock(channels, width, stride))
                channels = width
            self.add_module(f"layer{number}", layer)
        self.fc = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes) for images (n, 3, H, W)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(x.mean(dim=(2, 3)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet20(num_classes: int, *, width: int = 16) -> nn.Module:
    """Build ResNet20: three stages of three blocks; 272,474 parameters with 10 classes."""
    return CifarResNet(num_classes, (width, 2 * width, 4 * width), blocks=3)


def resnet18(num_classes: int, *, width: int = 64) -> nn.Module:
    """Build ResNet18: four stages of two blocks; 11,173,962 parameters with 10 classes."""
    return CifarResNet(num_classes, (width, 2 * width, 4 * width, 8 * width), blocks=2)

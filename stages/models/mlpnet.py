"""MLPNet: 784-40-20-10 without biases, the small network of the published one-shot tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLPNet(nn.Module):
    """Three linear layers without biases, ReLU between them."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, num_classes) for images (n, 1, 28, 28)."""
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


def mlpnet(num_classes: int) -> nn.Module:
    """Build the network: 32,360 weights with 10 classes."""
    return MLPNet(num_classes)

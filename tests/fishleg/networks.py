"""Small networks that between them meet every kind of parameter, and a source for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fishleg.calibration import Calibration
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.parameters import Partition, partition_parameters
from tests.reference import Group

CLASSES = 3


class Mixed(nn.Module):
    """Grouped convolution, batch and layer norm, bare parameters, layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.act = nn.ReLU(inplace=True)
        self.layer_norm = nn.LayerNorm(6)
        self.mix = nn.Parameter(torch.randn(6, 5) / 2)
        self.gain = nn.Parameter(torch.tensor(0.8))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 2, 5, 5) to (n, CLASSES)."""
        x = self.act(self.norm(self.conv(x)))
        x = self.act(self.grouped(x)).flatten(2).mT
        return self.head(self.gain * (self.layer_norm(x) @ self.mix).tanh().mean(1))


class Tied(nn.Module):
    """One weight in two modules, a module called twice, and one used through its weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(4, 4)
        self.functional = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 4) to (n, CLASSES)."""
        x = self.second(self.first(x).tanh()).tanh()
        x = self.twice(self.twice(x).tanh()).tanh()
        return self.head(functional.linear(x, self.functional.weight, self.functional.bias).tanh())


class Attention(nn.Module):
    """An encoder layer over tokens; without `batch_first` samples are in the second dimension."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first)
        self.head = nn.Linear(4, CLASSES)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, 5) token numbers to (n, CLASSES)."""
        x = self.embed(tokens) + self.position
        if self.batch_first:
            x = self.encoder(x)
        else:
            x = self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


def shake(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return `model` in `dtype`, every parameter and running statistic away from its default."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer += torch.rand(buffer.shape, generator=generator, dtype=dtype)
    return model


def mixed_source(
    samples: int = 6, dtype: torch.dtype = torch.float64, **options: Any
) -> GradientSource:
    """Return a source over `Mixed` and random inputs, with data labels to hand."""
    torch.manual_seed(0)
    model = shake(Mixed(), dtype=dtype)
    calibration = Calibration(
        inputs=torch.randn(samples, 2, 5, 5, dtype=dtype),
        targets=torch.arange(samples) % CLASSES,
    )
    return source_of(model, calibration, **options)


def source_of(model: nn.Module, calibration: Calibration, **options: Any) -> GradientSource:
    """Return a categorical source over all parameters of `model`."""
    partition = partition_parameters(model)
    return GradientSource(model, Categorical(), partition, calibration, **options)


def reference_groups(partition: Partition) -> list[Group]:
    """Return the partition's groups as the reference functions take them."""
    return [(group.weight, group.bias) for group in partition.groups]

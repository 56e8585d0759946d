"""Networks to train from fresh weights, with their data: the optimiser's problems."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from fishleg.likelihoods import Bernoulli, Categorical, Likelihood
from stages.data.batches import training_batches
from stages.data.cifar import load_cifar10
from stages.data.dataset import DataSet, Split
from stages.data.digits import load as load_digits
from stages.data.mnist import load_mnist
from stages.models.digits_resnet import digits_resnet
from stages.models.resnet_cifar import resnet20

_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network to train, with its data.

    Attributes:
        build: makes the network with its first weights.
        likelihood: whose batch mean is the loss.
        batches: endless (inputs, targets).
        validation: (inputs, targets).
    """

    build: Callable[[], nn.Module]
    likelihood: Likelihood
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    validation: tuple[Tensor, Tensor]


def _autoencoder(batch_size: int, seed: int) -> Problem:
    data = load_mnist(_data_folder())
    images, held = (
        (split.inputs.float() / 255).flatten(1) for split in (data.train, data.validation)
    )

    def build() -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(_WIDTHS):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        while True:
            chosen = images[torch.randint(len(images), (batch_size,), generator=draw)]
            yield chosen, chosen

    return Problem(build=build, likelihood=Bernoulli(), batches=batches, validation=(held, held))


def _resnet20(batch_size: int, seed: int) -> Problem:
    data = load_cifar10(_data_folder())
    held = data.validation.take(torch.arange(0, len(data.validation), 5))
    return _classifier(data, held, resnet20, batch_size, seed)


def _digits(batch_size: int, seed: int) -> Problem:
    data = load_digits(_data_folder())
    return _classifier(data, data.validation, digits_resnet, batch_size, seed)


def _classifier(
    data: DataSet,
    held: Split,
    network: Callable[[int], nn.Module],
    batch_size: int,
    seed: int,
) -> Problem:
    """Return the training of a network on a data set's classes; `held` is for validation."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return network(data.num_classes)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            yield from training_batches(data, batch_size=batch_size, seed=seed, epoch=epoch)
            epoch += 1

    return Problem(
        build=build,
        likelihood=Categorical(),
        batches=batches,
        validation=(data.normalise(held.inputs), held.labels),
    )


def _data_folder() -> Path:
    return Path(os.environ.get("FISHLEG_DATA", "data"))


PROBLEMS: dict[str, Callable[[int, int], Problem]] = {
    "autoencoder": _autoencoder,
    "digits": _digits,
    "resnet20": _resnet20,
}
"""Name -> batch size and seed -> problem."""

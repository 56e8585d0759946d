"""Batches of a training epoch: shuffled, cropped and flipped on the device, in a fixed order.

All random numbers of an epoch are drawn at its start from (seed, epoch), so batch b of epoch e is
the same in a run that was interrupted before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stages.data.dataset import DataSet
from stages.determinism import generator


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Return the number of full batches; a set smaller than one batch makes one."""
    return max(samples // batch_size, 1)


def training_batches(
    dataset: DataSet,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    augment: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) of the batches from number `start` on.

    Samples beyond the last full batch are left out; each epoch leaves out other ones.

    Args:
        dataset: its training split may be on any device; batches are made there.
        batch_size: samples in a batch.
        seed: of the run.
        epoch: number of the epoch, from 0.
        start: first batch wanted.
        augment: apply the data set's own crops and flips.

    Yields:
        inputs float32 (n, C, H, W), normalised; labels int64 (n,).
    """
    train = dataset.train
    draw = generator(seed, "epoch", epoch)
    order = torch.randperm(len(train), generator=draw)
    padding = dataset.crop_padding if augment else 0
    shifts = torch.randint(0, 2 * padding + 1, (len(train), 2), generator=draw)
    flips = torch.rand(len(train), generator=draw) < 0.5
    for batch in range(start, batches_per_epoch(len(train), batch_size)):
        chosen = order[batch * batch_size : (batch + 1) * batch_size]
        where = chosen.to(train.labels.device)
        images = train.inputs[where]
        if augment:
            images = _view(dataset, images, shifts[chosen], flips[chosen])
        yield dataset.normalise(images), train.labels[where]


def augmented(dataset: DataSet, images: Tensor, draw: torch.Generator) -> Tensor:
    """Return images (n, C, H, W), each with a crop and a flip of its own, as the data set has them.

    Args:
        dataset: declares the crops and flips.
        images: as stored.
        draw: of the crops and flips, a CPU generator.
    """
    padding = dataset.crop_padding
    shifts = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=draw)
    flips = torch.rand(len(images), generator=draw) < 0.5
    return _view(dataset, images, shifts, flips)


def _view(dataset: DataSet, images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Return each image cropped at its shift (n, 2) and, where its flag is set, flipped."""
    if dataset.crop_padding:
        images = crop(images, shifts.to(images.device), dataset.crop_padding)
    if dataset.flip:
        flip = flips.to(images.device).reshape(-1, *[1] * (images.ndim - 1))
        images = torch.where(flip, images.flip(-1), images)
    return images


def crop(images: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Return each image padded with zeros by `padding`, then cropped to its size at its own place.

    Args:
        images: (n, C, H, W).
        shifts: (n, 2) int64, top and left corner in the padded image, 0 <= shift <= 2 padding.
        padding: pixels added on every side.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    samples = torch.arange(n, device=images.device)[:, None, None]
    rows = shifts[:, 0, None, None] + torch.arange(height, device=images.device)[:, None]
    columns = shifts[:, 1, None, None] + torch.arange(width, device=images.device)
    return padded.permute(0, 2, 3, 1)[samples, rows, columns].permute(0, 3, 1, 2).contiguous()

"""What a data set is: decoded arrays in three splits, held as they are stored (uint8 for images).

Letters: N samples, C channels, H height, W width. Normalisation is part of the data set, and is
applied to batches on the device: x -> (x * scale - mean) / std, channel by channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples with labels.

    Attributes:
        inputs: (N, C, H, W) uint8, or float32 for data that are no images; any rank.
        labels: (N,) int64 class numbers.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """Return the samples at `indices`, (n,) int64, in that order."""
        return Split(inputs=self.inputs[indices], labels=self.labels[indices])

    def to(self, device: str) -> Split:
        """Return the split with its tensors on `device`."""
        return Split(inputs=self.inputs.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Three disjoint splits, and how a batch of them becomes a model's input.

    Attributes:
        train: what is trained on, and what calibration samples are drawn from.
        validation: training samples set apart; all choices are made on them.
        test: read once for each reported number.
        num_classes: number of labels.
        mean: per channel, of the scaled values.
        std: per channel, of the scaled values.
        scale: factor before the normalisation (1/255 for images in bytes).
        crop_padding: augmentation: zeros added on each side before a random crop; 0 for none.
        flip: augmentation: random horizontal flips.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    crop_padding: int = 0
    flip: bool = False

    def split(self, name: str) -> Split:
        """Return the split of that name: "train", "validation" or "test"."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def map_splits(self, change: Callable[[Split], Split]) -> DataSet:
        """Return a copy whose three splits went through `change`."""
        return replace(
            self,
            train=change(self.train),
            validation=change(self.validation),
            test=change(self.test),
        )

    def normalise(self, batch: Tensor) -> Tensor:
        """Return a model's input from stored samples.

        Args:
            batch: (n, C, H, W) uint8 or float32, on any device.

        Returns:
            float32 of the same shape; images are laid out channels-last, which convolutions like.
        """
        shape = (1, -1) + (1,) * (batch.ndim - 2)
        mean = torch.tensor(self.mean, device=batch.device).reshape(shape)
        std = torch.tensor(self.std, device=batch.device).reshape(shape)
        scaled = (batch.float() * self.scale - mean) / std
        if scaled.ndim == 4:
            return scaled.contiguous(memory_format=torch.channels_last)
        return scaled


def digest_arrays(dataset: DataSet) -> str:
    """Return the hex sha256 of all decoded arrays, with their names, types and shapes.

    Equal arrays have equal digests whatever files they came from. Cost: about 0.5 s a gigabyte.
    """
    total = hashlib.sha256()
    for name in ("train", "validation", "test"):
        split = dataset.split(name)
        for part, tensor in (("inputs", split.inputs), ("labels", split.labels)):
            header = f"{name}.{part} {str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}\n"
            total.update(header.encode())
            total.update(tensor.contiguous().numpy().data.cast("B"))
    return total.hexdigest()


def spread(split: Split, count: int) -> Split:
    """Return `count` samples spread evenly over the split (all, when it has no more).

    Even spacing keeps all classes in a subset of data that are stored class by class.
    """
    if count >= len(split):
        return split
    return split.take(torch.arange(count) * len(split) // count)


def hold_out_last(inputs: Tensor, labels: Tensor, count: int) -> tuple[Split, Split]:
    """Cut the last `count` training samples off as the validation split."""
    cut = len(labels) - count
    return (
        Split(inputs=inputs[:cut], labels=labels[:cut]),
        Split(inputs=inputs[cut:], labels=labels[cut:]),
    )


def hold_out_per_class(inputs: Tensor, labels: Tensor, fraction: float) -> tuple[Split, Split]:
    """Set apart the last `fraction` of each class as the validation split, order kept.

    At least one sample of every class that has two goes to validation.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        where = (labels == label).nonzero().flatten()
        count = max(round(fraction * len(where)), 1) if len(where) > 1 else 0
        held[where[len(where) - count :]] = True
    everything = Split(inputs=inputs, labels=labels)
    return everything.take((~held).nonzero().flatten()), everything.take(held.nonzero().flatten())

"""A data set: decoded arrays in three splits, in their stored type (uint8 for images).

Letters: N samples, C channels, H height, W width. The type of the inputs gives their meaning: bytes
and floating-point numbers are `VALUES`, int32 and int64 are `IDS`, as of tokens. Normalisation is
part of the data set, and applies to batches of values on the device: x -> (x * scale - mean) / std,
channel by channel. Ids go to the network unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")
VALUES = (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16)
IDS = (torch.int64, torch.int32)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples with labels.

    Attributes:
        inputs: images (N, C, H, W) uint8; other values (N, features, ...), floating-point; or ids
            (N, ...), int64 or int32.
        labels: (N,) int64 class numbers, from 0.
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
    """Three disjoint splits, and the normalisation that makes a model's input of a batch.

    Attributes:
        train: samples for training, and for calibration.
        validation: training samples set apart; all choices are made on them.
        test: read once for each reported number.
        num_classes: number of labels.
        mean: of the scaled values, one for each channel or one for all; none for ids, nor for
            values that are scaled only.
        std: likewise.
        scale: factor before the normalisation (1/255 for images in bytes).
        crop_padding: augmentation: zeros added on each side before a random crop; 0 for none.
        flip: augmentation: random horizontal flips.
        notes: about the data, a sentence each; the stage that loads them first logs them.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1 / 255
    crop_padding: int = 0
    flip: bool = False
    notes: tuple[str, ...] = ()

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

    def formula(self) -> str:
        """Return the formula of `normalise` for a stored input x."""
        if self.train.inputs.dtype in IDS:
            return "ids, unchanged"
        scaled = "x" if self.scale == 1 else f"x * {self.scale:.6g}"
        if not self.mean:
            return scaled
        mean, std = (", ".join(f"{one:g}" for one in many) for many in (self.mean, self.std))
        return f"({scaled} - [{mean}]) / [{std}]"

    def normalise(self, batch: Tensor) -> Tensor:
        """Return a model's input from stored samples.

        Args:
            batch: samples of a split, on any device.

        Returns:
            The same shape. Values become float32, and images channels-last, which is fast in
            convolutions; ids stay unchanged.
        """
        if batch.dtype in IDS:
            return batch
        scaled = batch.float() * self.scale
        if self.mean:
            shape = (1, -1) + (1,) * (batch.ndim - 2)
            mean = torch.tensor(self.mean, device=batch.device).reshape(shape)
            std = torch.tensor(self.std, device=batch.device).reshape(shape)
            scaled = (scaled - mean) / std
        if scaled.ndim == 4:
            return scaled.contiguous(memory_format=torch.channels_last)
        return scaled


def digest_arrays(dataset: DataSet) -> str:
    """Return the hex sha256 of all decoded arrays, with their names, types and shapes.

    Equal arrays from different files have equal digests. Cost: about 0.5 s a gigabyte.
    """
    total = hashlib.sha256()
    for name in SPLITS:
        _add_arrays(total, name, dataset.split(name))
    return total.hexdigest()


def digest_split(split: Split) -> str:
    """Return the first 12 hex digits of the sha256 of a split's arrays, types and shapes.

    Equal samples in one order have one digest, also in data sets that differ elsewhere.
    """
    total = hashlib.sha256()
    _add_arrays(total, "split", split)
    return total.hexdigest()[:12]


def _add_arrays(total: hashlib._Hash, name: str, split: Split) -> None:
    """Add a split's arrays, with their names, types and shapes, to a digest."""
    for part, tensor in (("inputs", split.inputs), ("labels", split.labels)):
        header = f"{name}.{part} {str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}\n"
        total.update(header.encode())
        plain = tensor.contiguous()
        if plain.dtype == torch.bfloat16:
            plain = plain.view(torch.int16)  # numpy has no such type
        total.update(plain.numpy().data.cast("B"))


def spread(split: Split, count: int) -> Split:
    """Return `count` samples spread evenly over the split, or all if it has fewer.

    Even spacing keeps all classes in a subset of data that are stored class by class.
    """
    if count >= len(split):
        return split
    return split.take(torch.arange(count) * len(split) // count)


def hold_out_last(inputs: Tensor, labels: Tensor, count: int) -> tuple[Split, Split]:
    """Split off the last `count` training samples for validation."""
    cut = len(labels) - count
    return (
        Split(inputs=inputs[:cut], labels=labels[:cut]),
        Split(inputs=inputs[cut:], labels=labels[cut:]),
    )


def hold_out_per_class(inputs: Tensor, labels: Tensor, fraction: float) -> tuple[Split, Split]:
    """Split off the last `fraction` of each class for validation, order kept.

    At least one sample of every class that has two goes to validation.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        where = (labels == label).nonzero().flatten()
        count = max(round(fraction * len(where)), 1) if len(where) > 1 else 0
        held[where[len(where) - count :]] = True
    everything = Split(inputs=inputs, labels=labels)
    return everything.take((~held).nonzero().flatten()), everything.take(held.nonzero().flatten())

"""CIFAR-10 and CIFAR-100, in the python and in the binary version: the same arrays from either.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. The validation split is
the last 5,000 training images.
"""

from __future__ import annotations

import importlib
import pickle  # noqa: S403 - only through _ArraysOnly, which builds arrays and nothing else
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.stage import StageError
from stages.data.dataset import DataSet, Split, hold_out_last
from stages.data.missing import MissingData, find_or_fetch
from stages.data.place import CIFAR100
from stages.torchvision_import import import_torchvision

# Errors of unpickling for bytes that are no batch.
_BROKEN = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError)
_PIXELS = 3 * 32 * 32
_VALIDATION = 5_000


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One published form of a data set: a folder, its files, and the place of the label."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int = 0  # binary version: label bytes before each image; the last one is ours
    label_key: str = ""  # python version: the pickled dictionary's key

    def found(self, root: Path) -> bool:
        return all((root / self.folder / name).is_file() for name in (*self.train, *self.test))

    def read(self, root: Path, names: tuple[str, ...]) -> Split:
        parts = [self._read_file(root / self.folder / name) for name in names]
        return Split(
            inputs=torch.cat([part.inputs for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
        )

    def _read_file(self, path: Path) -> Split:
        if self.label_key:
            images, labels = _read_pickled(path, self.label_key)
        else:
            images, labels = _read_binary(path, self.label_bytes)
        return Split(inputs=images.reshape(-1, 3, 32, 32), labels=labels.to(torch.int64))


_CIFAR10 = (
    _Version(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        label_bytes=1,
    ),
    _Version(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        label_key="labels",
    ),
)
_BINARY, _PYTHON = CIFAR100
_CIFAR100 = (
    _Version(
        folder=_BINARY, train=CIFAR100[_BINARY][:1], test=CIFAR100[_BINARY][1:], label_bytes=2
    ),
    _Version(
        folder=_PYTHON,
        train=CIFAR100[_PYTHON][:1],
        test=CIFAR100[_PYTHON][1:],
        label_key="fine_labels",
    ),
)


def load_cifar10(root: Path, *, download: bool = False) -> DataSet:
    """Return CIFAR-10: 45,000 + 5,000 + 10,000 images of 3x32x32 bytes, 10 classes."""
    return _load("CIFAR10", _CIFAR10, 10, root, download)


def load_cifar100(root: Path, *, download: bool = False) -> DataSet:
    """Return CIFAR-100 with its fine labels: 45,000 + 5,000 + 10,000 images, 100 classes."""
    return _load("CIFAR100", _CIFAR100, 100, root, download)


def _load(
    name: str, versions: tuple[_Version, ...], num_classes: int, root: Path, download: bool
) -> DataSet:
    def find() -> _Version | None:
        return next((version for version in versions if version.found(root)), None)

    if download:
        datasets = import_torchvision("datasets")
        find_or_fetch(find, lambda: getattr(datasets, name)(str(root), download=True), root)
    version = find()
    if version is None:
        layout = "\nor ".join(
            f"{one.folder}/{{{','.join((*one.train, *one.test))}}}" for one in versions
        )
        raise MissingData(name, root, layout)
    train = version.read(root, version.train)
    held = min(_VALIDATION, len(train) // 2)  # a cut-down copy keeps training samples
    training, validation = hold_out_last(train.inputs, train.labels, held)
    return DataSet(
        train=training,
        validation=validation,
        test=version.read(root, version.test),
        num_classes=num_classes,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_padding=4,
        flip=True,
    )


def _read_binary(path: Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Read rows of label bytes followed by 3,072 pixels.

    Raises:
        StageError: the file does not hold whole rows.
    """
    row = label_bytes + _PIXELS
    size = path.stat().st_size
    if size == 0 or size % row:
        raise StageError(f"{path}: {size} bytes are not whole rows of {row}; the file is damaged.")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).reshape(-1, row)
    return data[:, label_bytes:].contiguous(), data[:, label_bytes - 1]


def _read_pickled(path: Path, label_key: str) -> tuple[Tensor, Tensor]:
    """Read one batch of the python version.

    Raises:
        StageError: the file is damaged, or holds more than arrays.
    """
    try:
        with open(path, "rb") as file:
            batch = _ArraysOnly(file, encoding="latin1").load()
        pixels, labels = torch.from_numpy(batch["data"]), torch.tensor(batch[label_key])
    except _BROKEN as error:
        raise StageError(f"{path}: expected a CIFAR batch, got {error!r}.") from None
    expected = ((len(labels), _PIXELS), torch.uint8, torch.int64)
    if (tuple(pixels.shape), pixels.dtype, labels.dtype) != expected:
        raise StageError(
            f"{path}: expected as many rows of {_PIXELS} bytes as labels, got {pixels.dtype} "
            f"{tuple(pixels.shape)} and {labels.dtype} {tuple(labels.shape)}; get it again."
        )
    return pixels, labels


class _ArraysOnly(pickle.Unpickler):  # noqa: S301 - it makes unpickling safe
    """Unpickles numpy arrays and plain containers; any other type in the file is refused."""

    _ALLOWED = {
        ("multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"): ("numpy", "ndarray"),
        ("numpy", "dtype"): ("numpy", "dtype"),
        ("_codecs", "encode"): ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a permitted type; numpy's old module names lead to the present ones.

        Raises:
            pickle.UnpicklingError: any other type.
        """
        known = self._ALLOWED.get((module.rpartition(".")[2], name))
        if known is None:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR batch")
        return getattr(importlib.import_module(known[0]), known[1])

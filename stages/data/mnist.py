"""MNIST and Fashion-MNIST from their idx files in NAME/raw/, as in torchvision.

Y. LeCun et al., 1998; H. Xiao et al., arXiv 1708.07747. The validation split is the last 5,000
training images.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pipeline.stage import StageError
from stages.data.dataset import DataSet, Split, hold_out_last
from stages.data.missing import MissingData, find_or_fetch
from stages.data.place import FASHION_MNIST
from stages.torchvision_import import import_torchvision

_VALIDATION = 5_000
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_REMEDY = "remove it and get it again."
_UNSIGNED_BYTE = 8  # the idx format's code for the element type


def load_mnist(root: Path, *, download: bool = False) -> DataSet:
    """Return MNIST: 55,000 + 5,000 + 10,000 images of 1x28x28 bytes, 10 classes."""
    return _load("MNIST", root, download, mean=0.1307, std=0.3081)


def load_fashion_mnist(root: Path, *, download: bool = False) -> DataSet:
    """Return Fashion-MNIST: 55,000 + 5,000 + 10,000 images of 1x28x28 bytes, 10 classes."""
    return _load(FASHION_MNIST, root, download, mean=0.2860, std=0.3530)


def _load(name: str, root: Path, download: bool, *, mean: float, std: float) -> DataSet:
    folder = root / name / "raw"

    def find() -> list[Path] | None:
        paths = [_existing(folder / file) for file in _FILES]
        return [path for path in paths if path] if all(paths) else None

    if download:
        datasets = import_torchvision("datasets")
        find_or_fetch(find, lambda: getattr(datasets, name)(str(root), download=True), root)
    found = find()
    if found is None:
        files = ",".join(_FILES)
        raise MissingData(name, root, f"{name}/raw/{{{files}}}, each plain or with .gz")
    images, labels, test_images, test_labels = (
        _read_idx(path, rank) for path, rank in zip(found, (3, 1, 3, 1), strict=True)
    )
    held = min(_VALIDATION, len(labels) // 2)  # a cut-down copy keeps training samples
    train, validation = hold_out_last(images.unsqueeze(1), labels.to(torch.int64), held)
    return DataSet(
        train=train,
        validation=validation,
        test=Split(inputs=test_images.unsqueeze(1), labels=test_labels.to(torch.int64)),
        num_classes=10,
        mean=(mean,),
        std=(std,),
        crop_padding=2,
    )


def _existing(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return next((one for one in (path, packed) if one.is_file()), None)


def _read_idx(path: Path, rank: int) -> Tensor:
    """Return the uint8 array of an idx file: magic 00 00 08 RANK, big-endian sizes, then bytes.

    Raises:
        StageError: the file is no idx file, is damaged, or has another number of dimensions.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, found = struct.unpack(">HBB", data[:4])
        sizes = struct.unpack(f">{found}I", data[4 : 4 + 4 * found])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise StageError(f"{path}: {error}; {_REMEDY}") from None
    body = data[4 + 4 * found :]
    if zero or kind != _UNSIGNED_BYTE or found != rank or len(body) != prod(sizes):
        raise StageError(
            f"{path} is not a whole idx file of bytes in {rank} dimension{'s' * (rank > 1)}; "
            f"{_REMEDY}"
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(sizes)

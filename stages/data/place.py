"""The folders of data sets. The catalogue imports this, so it imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Folder -> its files, of the published forms of CIFAR-100, by preference.
CIFAR100 = {
    "cifar-100-binary": ("train.bin", "test.bin"),
    "cifar-100-python": ("train", "test"),
}
FASHION_MNIST = "FashionMNIST"
TINY_IMAGENET = "tiny-imagenet-200"


def data_folder() -> Path:
    """Return the folder of all data sets: `FISHLEG_DATA`, by default `data`."""
    return Path(os.path.expanduser(os.environ.get("FISHLEG_DATA") or "data"))


def tree_folder(root: Path, path: str) -> Path:
    """Return the folder of a tree of images: `path` under `root`, unless absolute or from `~`."""
    return root / os.path.expanduser(path)


def complete_folder(root: Path, forms: Mapping[str, Sequence[str]]) -> Path:
    """Return the first folder under `root` with all its files, or else the first one."""
    whole = (
        name for name, files in forms.items() if all((root / name / f).is_file() for f in files)
    )
    return root / next(whole, next(iter(forms)))

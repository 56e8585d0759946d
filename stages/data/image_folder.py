"""Trees of images: one folder a class, one folder a split. Tiny ImageNet is one of them.

A tree has `train/CLASS/*` and a test split `test/CLASS/*` or `val/CLASS/*`; where both are there,
`val` is the validation split, else a tenth of each class's training images is set apart for it.
Decoded arrays are cached beside the tree, since decoding 100,000 JPEGs takes a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.stage import StageError
from stages.data.dataset import DataSet, Split, hold_out_per_class
from stages.data.missing import MissingData, find_or_fetch
from stages.torchvision_import import import_torchvision

_SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm"}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_LAYOUT = "train/CLASS/IMAGE, and test/CLASS/IMAGE or val/CLASS/IMAGE (jpeg, png, bmp, webp, ppm)"

_Labelled = list[tuple[Path, int]]


def load(
    path: str, root: Path, *, download: bool = False, image_size: int | None = None
) -> DataSet:
    """Return the tree of images at `path` (of `folder:PATH`), relative ones under `root`.

    Args:
        path: the tree's folder.
        root: the data folder.
        download: trees cannot be downloaded; the error says so.
        image_size: shorter side after resizing, then a centre crop to a square; None when all
            images have the same size already.

    Raises:
        MissingData: the tree is not there. (Images that differ in size are a StageError.)
    """
    del download
    tree = root / path
    splits = {
        name: _labelled(tree / name) for name in ("train", "val", "test") if (tree / name).is_dir()
    }
    if "train" not in splits or len(splits) < 2:
        raise MissingData(f"The tree of images {path!r}", tree, _LAYOUT, downloadable=False)
    decoded = _decode_cached(tree, splits, image_size)
    if len(splits) == 3:
        train, validation, test = decoded["train"], decoded["val"], decoded["test"]
    else:
        train, validation = hold_out_per_class(
            decoded["train"].inputs, decoded["train"].labels, 0.1
        )
        test = decoded["test" if "test" in decoded else "val"]
    return _data_set(train, validation, test)


def load_tiny_imagenet(root: Path, *, download: bool = False) -> DataSet:
    """Return Tiny ImageNet: 95,000 + 5,000 + 10,000 images of 3x64x64 bytes, 200 classes.

    The official test images have no labels, so the official validation images are the test split
    here, as in the literature; validation is the last 5 % of each class's training images.

    Raises:
        MissingData: it is not there.
    """
    tree = root / "tiny-imagenet-200"

    def find() -> Path | None:
        return tree if (tree / "val" / "val_annotations.txt").is_file() else None

    if download:
        utils = import_torchvision("datasets.utils")
        find_or_fetch(
            find,
            lambda: utils.download_and_extract_archive(_TINY_URL, str(root), md5=_TINY_MD5),
            root,
        )
    if find() is None:
        layout = (
            "tiny-imagenet-200/train/CLASS/images/*.JPEG\n"
            "tiny-imagenet-200/val/images/*.JPEG and tiny-imagenet-200/val/val_annotations.txt"
        )
        raise MissingData("Tiny ImageNet", root, layout)
    train = _labelled(tree / "train")
    classes = {name: number for number, name in enumerate(_classes(tree / "train"))}
    annotations = (tree / "val" / "val_annotations.txt").read_text("utf-8").splitlines()
    rows = sorted(line.split("\t")[:2] for line in annotations if line)
    test = [(tree / "val" / "images" / name, classes[label]) for name, label in rows]
    decoded = _decode_cached(tree, {"train": train, "test": test}, None)
    training, validation = hold_out_per_class(
        decoded["train"].inputs, decoded["train"].labels, 0.05
    )
    return _data_set(training, validation, decoded["test"])


def _data_set(train: Split, validation: Split, test: Split) -> DataSet:
    labels = torch.cat([train.labels, validation.labels, test.labels])
    return DataSet(
        train=train,
        validation=validation,
        test=test,
        num_classes=int(labels.max()) + 1,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        crop_padding=train.inputs.shape[-1] // 8,
        flip=True,
    )


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _labelled(folder: Path) -> _Labelled:
    """Return (image, class number) sorted by class, then by path below the class's folder."""
    return [
        (path, number)
        for number, name in enumerate(_classes(folder))
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]


def _decode_cached(
    tree: Path, splits: dict[str, _Labelled], image_size: int | None
) -> dict[str, Split]:
    """Decode all splits, or take them from `.decoded-HASH.safetensors` in the tree.

    The hash covers every path, size and modification time, so a changed tree is decoded again. A
    tree that cannot be written to is decoded each time.
    """
    listing = [
        [name, str(path.relative_to(tree)), path.stat().st_size, path.stat().st_mtime_ns]
        for name, images in splits.items()
        for path, _ in images
    ]
    state = json.dumps([listing, image_size]).encode()
    cache = tree / f".decoded-{hashlib.sha256(state).hexdigest()[:16]}.safetensors"
    try:
        images = load_file(cache)
    except (FileNotFoundError, SafetensorError):
        images = {name: _decode(labelled, image_size) for name, labelled in splits.items()}
        if os.access(tree, os.W_OK):
            part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
            save_file(images, part)
            part.replace(cache)
    return {
        name: Split(inputs=images[name], labels=torch.tensor([label for _, label in labelled]))
        for name, labelled in splits.items()
    }


def _decode(images: _Labelled, image_size: int | None) -> Tensor:
    """Return (N, 3, H, W) uint8.

    Raises:
        StageError: there is no image, or two differ in size.
    """
    stack: Tensor | None = None
    for index, (path, pixels) in enumerate(_pixels(images, image_size)):
        if stack is None:
            stack = torch.empty((len(images), *pixels.shape), dtype=torch.uint8)
        if pixels.shape != stack.shape[1:]:
            raise StageError(
                f"{path} has the size {[*pixels.shape[1:]]}, the images before it "
                f"{[*stack.shape[2:]]}. Give all one size: dataset_args: {{image_size: 64}}."
            )
        stack[index] = pixels
    if stack is None:
        raise StageError(f"A split of the tree has no image. Expected {_LAYOUT}.")
    return stack


def _pixels(images: _Labelled, image_size: int | None) -> Iterator[tuple[Path, Tensor]]:
    from PIL import Image, ImageOps  # lazily: only trees of images need it

    for path, _ in images:
        with Image.open(path) as file:
            image = file.convert("RGB")
        if image_size is not None:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        yield path, raw.reshape(image.height, image.width, 3).permute(2, 0, 1)

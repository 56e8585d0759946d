"""Trees of images: a folder for each split, and in it one for each class; Tiny ImageNet is one.

A tree has `train/CLASS/*` and a test split `test/CLASS/*` or `val/CLASS/*`; with both, `val` is the
validation split, else a tenth of each class's training images is. The folders in `train`, sorted by
name, are the classes of all splits: a class that another split lacks moves no label, and a class
that `train` lacks is an error. Hidden files (`.DS_Store`, `.ipynb_checkpoints`, `__MACOSX`) are
ignored. `stages.data.images` reads the files. Decoded arrays are cached in the tree, since decoding
100,000 JPEGs takes a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.stage import StageError
from stages.data.dataset import DataSet, Split, hold_out_per_class
from stages.data.images import RULES, SUFFIXES, Reading, read_image
from stages.data.missing import MissingData, find_or_fetch
from stages.data.place import TINY_IMAGENET, tree_folder
from stages.torchvision_import import import_torchvision

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_LAYOUT = "train/CLASS/IMAGE, and test/CLASS/IMAGE or val/CLASS/IMAGE (jpeg, png, bmp, webp, ppm)"

_Labelled = list[tuple[Path, int]]
_HIDDEN = (".", "__MACOSX")  # prefixes of names


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """The splits of a tree, and notes about their images."""

    splits: Mapping[str, Split]
    notes: tuple[str, ...]


def load(
    path: str,
    root: Path,
    *,
    download: bool = False,
    image_size: int | None = None,
    background: int | None = None,
    upright: bool = False,
) -> DataSet:
    """Return the tree of images at `path` (of `folder:PATH`), relative ones under `root`.

    Args:
        path: the tree's folder.
        root: the data folder.
        download: ignored, since a tree has no source to download from.
        image_size: shorter side after resizing, then a centre crop to a square; None when all
            images have the same size already.
        background: grey level, 0 to 255, behind transparent pixels; None refuses such images.
        upright: turn photographs by their EXIF orientation. By default they stay as stored, as in
            torchvision's ImageFolder, and a note tells their number.

    Raises:
        MissingData: the tree is missing.
        StageError: a split has a class that `train` lacks, a class has no training image, images
            differ in size, or an image is damaged or refused; the message has its path.
    """
    del download
    tree = tree_folder(root, path)
    names = [name for name in ("train", "val", "test") if (tree / name).is_dir()]
    if "train" not in names or len(names) < 2:
        raise MissingData(f"The tree of images {path!r}", tree, _LAYOUT, downloadable=False)
    classes = _folders(tree / "train")
    others = [name for name in _folders(tree) if name not in names]
    notes = [f"{tree}: {_some(others)}: ignored, not train, val or test"] if others else []
    splits = {name: _labelled(tree / name, classes, notes) for name in names}
    without = sorted(set(range(len(classes))) - {label for _, label in splits["train"]})
    if without:
        raise StageError(
            f"{tree / 'train' / classes[without[0]]} has no image, but each folder in train is a "
            f"class. Put images there, or remove the folder. Expected {_LAYOUT}."
        )
    reading = Reading(image_size=image_size, background=background, upright=upright)
    decoded = _decode_cached(tree, splits, reading)
    parts = dict(decoded.splits)
    if len(parts) == 3:
        train, validation, test = parts["train"], parts["val"], parts["test"]
    else:
        train, validation = hold_out_per_class(parts["train"].inputs, parts["train"].labels, 0.1)
        test = parts["test" if "test" in parts else "val"]
    if not len(validation):
        raise StageError(
            f"{tree / 'train'}: no class has two images, so that validation gets none. Add images, "
            "or a folder val beside train and test."
        )
    return _data_set(train, validation, test, len(classes), (*notes, *decoded.notes))


def load_tiny_imagenet(root: Path, *, download: bool = False) -> DataSet:
    """Return Tiny ImageNet: 95,000 + 5,000 + 10,000 images of 3x64x64 bytes, 200 classes.

    The official test images have no labels, so the official validation images are the test split
    here, as in the literature; validation is the last 5 % of each class's training images.

    Raises:
        MissingData: it is missing.
    """
    tree = root / TINY_IMAGENET

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
            f"{TINY_IMAGENET}/train/CLASS/images/*.JPEG\n"
            f"{TINY_IMAGENET}/val/images/*.JPEG and {TINY_IMAGENET}/val/val_annotations.txt"
        )
        raise MissingData("Tiny ImageNet", root, layout)
    classes = _folders(tree / "train")
    train = _labelled(tree / "train", classes, [])
    test = _annotated(tree / "val", classes)
    decoded = _decode_cached(tree, {"train": train, "test": test}, Reading())
    whole = decoded.splits["train"]
    training, validation = hold_out_per_class(whole.inputs, whole.labels, 0.05)
    return _data_set(training, validation, decoded.splits["test"], len(classes), decoded.notes)


def _annotated(folder: Path, classes: Sequence[str]) -> _Labelled:
    """Return (image, class number) of each line of Tiny ImageNet's annotations, sorted.

    Raises:
        StageError: a line names a missing image, or no class.
    """
    path = folder / "val_annotations.txt"
    numbers = {name: number for number, name in enumerate(classes)}
    labelled = []
    for line, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not text:
            continue
        name, _, rest = text.partition("\t")
        label = rest.partition("\t")[0]
        image = folder / "images" / name
        if label not in numbers:
            raise StageError(f"{path}:{line}: {label!r} is no class folder of train.")
        if not image.is_file():
            raise StageError(f"{path}:{line}: {image} is missing.")
        labelled.append((image, numbers[label]))
    return sorted(labelled)


def _data_set(
    train: Split, validation: Split, test: Split, num_classes: int, notes: tuple[str, ...]
) -> DataSet:
    return DataSet(
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        crop_padding=train.inputs.shape[-1] // 8,
        flip=True,
        notes=notes,
    )


def _folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden ones."""
    found = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in found if not name.startswith(_HIDDEN))


def _labelled(folder: Path, classes: Sequence[str], notes: list[str]) -> _Labelled:
    """Return (image, class number) of a split, sorted by class, then by path below its folder.

    Args:
        folder: of the split.
        classes: names of the class folders of `train`, in the order of their numbers.
        notes: gets notes about ignored files.

    Raises:
        StageError: the split has a folder that is no class, no image, or a dangling link.
    """
    here = _folders(folder)
    for name in here:
        if name not in classes:
            near = get_close_matches(name, classes, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise StageError(
                f"{folder / name} is no class: {folder.parent / 'train'}, whose folders are the "
                f"classes, has no folder of that name.{hint}"
            )
    missing = [name for name in classes if name not in here]
    if missing:
        notes.append(
            f"{folder} has no folder for {_some(missing)}, which {folder.parent / 'train'} has; "
            "the other classes keep their numbers."
        )
    labelled, others = [], [path for path in sorted(folder.iterdir()) if not path.is_dir()]
    for number, name in enumerate(classes):
        for path in _files(folder / name):
            if path.suffix.lower() in SUFFIXES and not _is_hidden(path.relative_to(folder)):
                labelled.append((path, number))
            else:
                others.append(path)
    left_out = [path for path in others if not _is_hidden(path.relative_to(folder))]
    if left_out:
        notes.append(
            f"{folder}: {len(left_out)} files are ignored: they are in no class folder, or not "
            f"jpeg, png, bmp, webp or ppm by their names; the first is {left_out[0]}."
        )
    if not labelled:
        raise StageError(f"{folder} has no image. Expected {_LAYOUT}.")
    return labelled


def _files(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted; links are followed, except to a folder above.

    `Path.rglob` follows links to folders in some versions of Python only.
    """
    found: list[Path] = []
    for here, folders, names in os.walk(folder, followlinks=True):
        inside = os.path.realpath(here) + os.sep
        paths = {name: os.path.realpath(os.path.join(here, name)) + os.sep for name in folders}
        folders[:] = [name for name in folders if not inside.startswith(paths[name])]
        found += [Path(here, name) for name in names]
    return sorted(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(_HIDDEN) for part in path.parts)


def _some(names: Sequence[str]) -> str:
    """Return up to five names, quoted, and the number of the rest."""
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _decode_cached(tree: Path, splits: Mapping[str, _Labelled], reading: Reading) -> _Decoded:
    """Decode all splits, or take them from `.decoded-HASH.safetensors` in the tree.

    The hash covers every path, size, time and inode, the options, and the version of the rules, so
    a changed tree is decoded again, as is a tree with a damaged cache. A tree without permission to
    write is decoded each time.
    """
    listing = [
        [name, str(path.relative_to(tree)), *_signature(path)]
        for name, images in splits.items()
        for path, _ in images
    ]
    state = json.dumps([RULES, listing, asdict(reading)]).encode()
    cache = tree / f".decoded-{hashlib.sha256(state).hexdigest()[:16]}.safetensors"
    found = _read_cache(cache)
    if found is None:
        found = _decode_all(splits, reading)
        _write_cache(cache, *found)
    images, notes = found
    return _Decoded(
        splits={
            name: Split(inputs=images[name], labels=torch.tensor([label for _, label in labelled]))
            for name, labelled in splits.items()
        },
        notes=notes,
    )


def _read_cache(cache: Path) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Return the images and notes in a cache; None if it is missing or damaged."""
    try:
        images = load_file(cache)
        with safe_open(cache, "pt") as file:
            about = json.loads(file.metadata()["about"])
        notes = about["notes"]
        if about["sha256"] != _checksum(images, notes):
            return None
        return images, tuple(json.loads(notes))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write_cache(cache: Path, images: dict[str, Tensor], notes: tuple[str, ...]) -> None:
    """Write a cache atomically and durably; without room on the disk, write none."""
    text = json.dumps(notes)
    about = {"notes": text, "sha256": _checksum(images, text)}
    part = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(images, part, metadata={"about": json.dumps(about)})
        for path in (part, cache.parent):
            opened = os.open(path, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
            if path is part:
                part.replace(cache)
    except (OSError, SafetensorError):
        part.unlink(missing_ok=True)


def _checksum(images: Mapping[str, Tensor], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    for name, stack in sorted(images.items()):
        digest.update(json.dumps([name, list(stack.shape), str(stack.dtype)]).encode())
        digest.update(stack.contiguous().numpy().data)
    return digest.hexdigest()


def _signature(path: Path) -> tuple[int, ...]:
    """Return the size, times and inode of a file, which change with it.

    The modification time alone does not: tools that copy files set it.

    Raises:
        StageError: the path is a dangling link.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise StageError(f"{path} is a link to a missing file.") from None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _decode_all(
    splits: Mapping[str, _Labelled], reading: Reading
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return split name -> uint8 (N, 3, H, W), and notes."""
    turned: list[Path] = []
    images = {name: _decode(labelled, reading, turned) for name, labelled in splits.items()}
    if not turned:
        return images, ()
    note = (
        f"{len(turned)} images have an EXIF orientation and are used as stored, not turned, as in "
        f"torchvision; the first is {turned[0]}. `dataset_args: {{upright: true}}` turns them."
    )
    return images, (note,)


def _decode(images: _Labelled, reading: Reading, turned: list[Path]) -> Tensor:
    """Return (N, 3, H, W) uint8.

    Raises:
        StageError: two images differ in size.
    """
    stack: Tensor | None = None
    for index, (path, pixels) in enumerate(_pixels(images, reading, turned)):
        if stack is None:
            stack = torch.empty((len(images), *pixels.shape), dtype=torch.uint8)
        if pixels.shape != stack.shape[1:]:
            raise StageError(
                f"{path} has the size {[*pixels.shape[1:]]}, the images before it "
                f"{[*stack.shape[2:]]}. Give all one size: dataset_args: {{image_size: 64}}."
            )
        stack[index] = pixels
    return stack if stack is not None else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


def _pixels(
    images: _Labelled, reading: Reading, turned: list[Path]
) -> Iterator[tuple[Path, Tensor]]:
    for path, _ in images:
        pixels, left = read_image(path, reading)
        if left:
            turned.append(path)
        yield path, pixels

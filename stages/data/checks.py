"""Checks of a data set when it is loaded, the same for a user's own loaders.

Each message names the split and the index of the first wrong sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.stage import StageError
from stages.data.dataset import IDS, SPLITS, VALUES, DataSet, Split

_AT_ONCE = 4096  # samples checked at a time


def check(dataset: DataSet, name: str) -> None:
    """Refuse data that would give a wrong training or measurement, or a late error.

    Args:
        dataset: from its loader, with the normalisation to be used.
        name: of the data set, for the message.

    Raises:
        StageError: a split is empty, inputs and labels do not fit each other, a label is no class,
            a number is not finite, or the normalisation does not fit the inputs.

    Cost: one pass over all labels, and over all floating-point inputs.
    """
    problem = next(_problems(dataset), None)
    if problem is not None:
        raise StageError(f"data set {name!r}: {problem}")


def _problems(dataset: DataSet) -> Iterator[str]:
    classes = dataset.num_classes
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        yield f"num_classes: expected a whole number of at least 1, got {classes!r}."
    for name in SPLITS:
        split = dataset.split(name)
        if not isinstance(split, Split):
            yield f"{name}: expected a stages.data.dataset.Split, got {type(split).__name__}."
        yield from _of_split(name, split, classes)
    yield from _between_splits(dataset)
    yield from _of_normalisation(dataset)
    yield from _of_augmentation(dataset)


def _of_split(name: str, split: Split, classes: int) -> Iterator[str]:
    for part, tensor in (("inputs", split.inputs), ("labels", split.labels)):
        if not isinstance(tensor, Tensor):
            yield f"{name}.{part}: expected a torch.Tensor, got {type(tensor).__name__}."
    inputs, labels = split.inputs, split.labels
    if labels.dtype != torch.int64 or labels.ndim != 1:
        yield (
            f"{name}.labels: expected class numbers as int64 (N,), got {_described(labels)}. "
            "Convert them with care: rounding or cutting off would change labels."
        )
    if inputs.dtype not in (*VALUES, *IDS):
        known = ", ".join(_plain(one) for one in (*VALUES, *IDS))
        yield (
            f"{name}.inputs: expected one of {known}, got {_plain(inputs.dtype)}. Convert "
            "values to float32, and ids to int64."
        )
    if inputs.ndim < (2 if inputs.dtype in VALUES else 1):
        yield (
            f"{name}.inputs: expected (N, channels or features, ...), got {tuple(inputs.shape)}; "
            "one value a sample has the shape (N, 1)."
        )
    if len(inputs) != len(labels):
        yield (
            f"{name}: {len(inputs)} inputs and {len(labels)} labels; sample "
            f"{min(len(inputs), len(labels))} has one without the other."
        )
    if len(labels) == 0:
        yield f"{name} has no sample; expected at least one in each of {', '.join(SPLITS)}."
    strange = _first((labels < 0) | (labels >= classes))
    if strange is not None:
        yield (
            f"{name}.labels[{strange}] is {int(labels[strange])}; expected a class number from 0 "
            f"to {classes - 1}, as num_classes is {classes}."
        )
    if inputs.is_floating_point():
        for start in range(0, len(inputs), _AT_ONCE):
            strange = _first(~inputs[start : start + _AT_ONCE].flatten(1).isfinite().all(1))
            if strange is not None:
                yield (
                    f"{name}.inputs[{start + strange}] has a number that is not finite (nan or "
                    "inf); correct or leave out the sample."
                )


def _between_splits(dataset: DataSet) -> Iterator[str]:
    train = dataset.train.inputs
    for name in SPLITS[1:]:
        inputs = dataset.split(name).inputs
        if (inputs.dtype, inputs.ndim, inputs.shape[1:2]) != (
            train.dtype,
            train.ndim,
            train.shape[1:2],
        ):
            yield (
                f"{name}.inputs: expected the type, dimensions and channels of train.inputs, "
                f"{_described(train)}, got {_described(inputs)}."
            )


def _of_normalisation(dataset: DataSet) -> Iterator[str]:
    inputs = dataset.train.inputs
    for name, given in (("mean", dataset.mean), ("std", dataset.std)):
        if not isinstance(given, Sequence):
            yield f"{name}: expected a tuple of numbers, got {given!r}."
    if inputs.dtype in IDS:
        if dataset.mean or dataset.std:
            yield (
                f"mean, std: {_plain(inputs.dtype)} inputs are ids, which go to the network "
                "unchanged; leave mean and std out, or convert inputs that are values to float32."
            )
        return
    if bool(dataset.mean) != bool(dataset.std):
        yield "mean and std: got one of them; expected both or none."
    channels = inputs.shape[1]
    for name, values in (("mean", dataset.mean), ("std", dataset.std)):
        if len(values) not in (0, 1, channels):
            yield (
                f"{name}: got {len(values)} numbers for inputs of {channels} channel"
                f"{'s' * (channels != 1)}, {_described(inputs)}; expected one for each, or one for "
                "all."
            )
        for number, value in enumerate(values):
            if not math.isfinite(value) or (name == "std" and value <= 0):
                expected = "a finite number" if name == "mean" else "a number above 0"
                yield f"{name}[{number}] is {value}; expected {expected}."
    if not math.isfinite(dataset.scale) or dataset.scale == 0:
        yield f"scale is {dataset.scale}; expected a finite number that is not 0."


def _of_augmentation(dataset: DataSet) -> Iterator[str]:
    inputs = dataset.train.inputs
    asked = [name for name in ("crop_padding", "flip") if getattr(dataset, name)]
    if asked and (inputs.ndim != 4 or inputs.dtype in IDS):
        yield (
            f"{' and '.join(asked)}: expected images (N, C, H, W), got {_described(inputs)}; "
            "other data are not cropped or flipped."
        )


def _first(found: Tensor) -> int | None:
    """Return the index of the first True, or None."""
    return int(found.nonzero()[0]) if found.any() else None


def _described(tensor: Tensor) -> str:
    return f"{_plain(tensor.dtype)} {tuple(tensor.shape)}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

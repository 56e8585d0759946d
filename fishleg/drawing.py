"""Calibration samples drawn by seed, from a tensor, a batch, a loader or any iterable of batches.

Sample i of the data has a random key that depends on the seed and on i alone, and the samples with
the lowest keys are drawn, in the order of their keys. So the draw does not depend on the batches,
and the first samples of a draw are a smaller draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from fishleg.calibration import Calibration, Samples
from fishleg.checks import check_integer
from fishleg.errors import ShapeMismatch, WrongType
from fishleg.loading import Pair, hold_batches, join_pairs, read_batch, read_batches, split_batch
from fishleg.nests import count_samples, map_tensors, tensors_of
from fishleg.rng import SampleGenerator

_STREAM = 2**32 - 1  # of the generator's draws, far from those of labels


def draw_samples(data: Any, count: int | None, seed: int) -> Samples:
    """Return samples drawn from data without replacement.

    Args:
        data: a `Calibration` or `StreamedCalibration`, which is taken as it is; or one batch: a
            tensor or array, a dict of them (inputs alone), or a tuple (inputs, targets) or
            (inputs,); or a data set or any iterable of batches, such as a DataLoader or a list.
            A DataLoader that visits its whole data set is asked for the drawn samples only; of
            another iterable all batches are read, once.
        count: number of samples, at least 1; None, or more than there are, takes all.
        seed: of the draw.

    Raises:
        ValueError: `count` is less than 1.
        WrongType: the data are none of these.
        ShapeMismatch: there is no sample.

    Other errors are those of `hold_batches`. Memory: of the drawn samples and one batch.
    """
    check_integer("seed", seed)
    if count is not None:
        check_integer("samples", count)
        if count < 1:
            raise ValueError(f"samples: expected at least 1, got {count}.")
    if hasattr(data, "batches") and hasattr(data, "has_targets"):
        return data
    if _is_batch(data):
        pair = read_batch(data, split_batch, "data")
        numbers = draw_numbers(count_samples(pair[0], "data"), count, seed)
        return _calibration(_pick(pair, numbers), numbers)
    if not isinstance(data, Iterable | Dataset) or isinstance(data, str):
        raise WrongType(
            "data: expected a tensor, (inputs, targets), or an iterable of batches such as a "
            f"DataLoader, got {type(data).__name__}."
        )
    loader = _whole_loader(data)
    if loader is None:
        return _calibration(*_draw_streamed(data, count, seed))
    size = len(loader.dataset)  # type: ignore[arg-type] # torch declares no length; these have one
    numbers = draw_numbers(size, count, seed)
    if not len(numbers):
        raise ShapeMismatch("data: expected at least one sample, got an empty data set.")
    drawn = DataLoader(
        Subset(loader.dataset, numbers.tolist()),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        # so that the process's own random numbers stay as they are
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
    return _calibration(hold_batches(drawn), numbers)


def draw_numbers(total: int, count: int | None, seed: int) -> Tensor:
    """Return the numbers of the drawn samples among `total`, (min(count, total),) int64."""
    return _keys(torch.arange(total), seed).argsort(stable=True)[:count]


def _keys(numbers: Tensor, seed: int) -> Tensor:
    return SampleGenerator(seed, numbers, _STREAM).uniform(1).squeeze(1)


def _is_batch(data: Any) -> bool:
    """Tell whether data are one batch; a list, as other iterables, is of batches."""
    return isinstance(data, Tensor | Mapping | tuple) or hasattr(data, "__array__")


def _whole_loader(data: Any) -> DataLoader | None:
    """Return a loader that visits each sample of a data set once, if data are or make one."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=256)
    if not isinstance(data, DataLoader) or type(data.batch_sampler) is not BatchSampler:
        return None
    sampler = data.sampler  # another kind may leave samples out, such as those held out
    whole = type(sampler) in (SequentialSampler, RandomSampler)
    whole = whole and not getattr(sampler, "replacement", False)
    # torch declares no length of samplers and data sets; these samplers have asked for it.
    if not whole or len(sampler) != len(data.dataset):  # type: ignore[arg-type] # as above
        return None
    return data


def _draw_streamed(batches: Any, count: int | None, seed: int) -> tuple[Pair, Tensor]:
    """Return the drawn samples of an iterable, and their numbers, in one pass.

    Raises:
        ShapeMismatch: there is no batch.
    """
    if count is None:
        pair = hold_batches(batches)
        numbers = draw_numbers(count_samples(pair[0], "data"), None, seed)
        return _pick(pair, numbers), numbers
    waiting: list[Pair] = []
    pool: Pair | None = None
    numbers = torch.empty(0, dtype=torch.int64)
    seen = 0
    for pair in read_batches(batches, split_batch):
        here = torch.arange(seen, seen + count_samples(pair[0], "data"))
        seen += len(here)
        if pool is None:
            waiting.append(_pick(pair, torch.arange(len(here))))  # a loader may reuse its memory
            numbers = torch.cat([numbers, here])
            if len(numbers) < count:
                continue
            pool = join_pairs(waiting)
            best = _keys(numbers, seed).argsort(stable=True)[:count]
            pool, numbers, waiting = _pick(pool, best), numbers[best], []
            continue
        _replace(pool, numbers, pair, here, seed)
    if pool is None:
        if not waiting:
            raise ShapeMismatch("data: expected at least one sample, got no batch.")
        pool = join_pairs(waiting)
    order = _keys(numbers, seed).argsort(stable=True)
    return _pick(pool, order), numbers[order]


def _replace(pool: Pair, numbers: Tensor, pair: Pair, here: Tensor, seed: int) -> None:
    """Let the samples of a batch that have lower keys take places in the pool."""
    keys = _keys(torch.cat([numbers, here]), seed)
    best = keys.argsort(stable=True)[: len(numbers)]
    comes = best[best >= len(numbers)] - len(numbers)
    stays = torch.zeros(len(numbers), dtype=torch.bool)
    stays[best[best < len(numbers)]] = True
    free = (~stays).nonzero().flatten()
    for old, new in zip(_leaves(pool), _leaves(pair), strict=True):
        old[free] = new[comes]
    numbers[free] = here[comes]


def _leaves(pair: Pair) -> list[Tensor]:
    inputs, targets = pair
    return [*tensors_of(inputs), *([] if targets is None else [targets])]


def _pick(pair: Pair, numbers: Tensor) -> Pair:
    """Return copies of some of the samples."""
    inputs, targets = pair
    return (
        map_tensors(lambda leaf: leaf[numbers.to(leaf.device)], inputs),
        None if targets is None else targets[numbers.to(targets.device)],
    )


def _calibration(pair: Pair, numbers: Tensor) -> Calibration:
    return Calibration(inputs=pair[0], targets=pair[1], indices=numbers)

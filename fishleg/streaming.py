"""Calibration samples that are read again in every pass, and checked to be the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fishleg.calibration import Batch, Transform, apply_transform, check_steady
from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.loading import (
    Pair,
    Split,
    check_iterable,
    checksum,
    join_pairs,
    read_batches,
    split_batch,
    take_pair,
)
from fishleg.nests import count_samples, map_tensors, usable


class StreamedCalibration:
    """Samples that are too many to be held, read from an iterable of batches in every pass.

    A fit takes several passes, and each has to see the same samples in the same order: neither
    shuffled, nor augmented at random. So a number that depends on each byte is kept of each batch,
    and a batch that differs in a later pass is an error. `Calibration.from_batches` holds the
    samples of a loader that shuffles or augments.

    Args:
        batches: such as a DataLoader, or a data set; may be iterated over any number of times.
        split: separates a batch's inputs and targets; see `fishleg.loading`.
        transform: turns a batch of inputs into the model's input.

    Raises:
        FishLegError: it may be iterated over only once.
        ShapeMismatch: there is no sample, or a batch is not like the first one.

    Cost: the constructor takes a pass over the data. Memory: about three of its batches.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        split: Split = split_batch,
        transform: Transform | None = None,
    ):
        check_iterable(batches)
        if isinstance(batches, Iterator):
            raise FishLegError(
                f"batches: expected an iterable that each pass may read again, got "
                f"{type(batches).__name__}, which gives its samples once; hold them instead, "
                "`Calibration.from_batches`."
            )
        self._loader = batches
        self._split = split
        self._transform = transform
        self._checksums: list[int] = []
        self._steady = transform is None
        self._length = 0
        self.has_targets = False
        for inputs, targets in read_batches(batches, split):
            self._checksums.append(checksum((inputs, targets)))
            self._length += count_samples(inputs, "inputs")
            self.has_targets = targets is not None
        if not self._length:
            raise ShapeMismatch("batches: expected at least one sample, got none.")

    def __repr__(self) -> str:
        targets = "with targets" if self.has_targets else "without targets"
        return f"StreamedCalibration({len(self)} samples, {targets})"

    def __len__(self) -> int:
        return self._length

    def batches(
        self, batch_size: int, device: torch.device, among: slice = slice(None)
    ) -> Iterator[Batch]:
        """Yield the samples in order, as `Calibration.batches`, for any batches of the loader.

        A FishLegError if the samples have changed.
        """
        first, end, _ = among.indices(len(self))
        starts = range(first, end, batch_size)
        sizes = [min(batch_size, end - start) for start in starts]
        pieces = _recut(self._checked(), first, sizes) if sizes else iter(())
        for start, (inputs, targets) in zip(starts, pieces, strict=True):
            inputs = map_tensors(lambda leaf: leaf.to(device), inputs)
            count = count_samples(inputs, "inputs")
            if self._transform is not None:
                if not self._steady:
                    check_steady(self._transform, inputs, device)
                    self._steady = True
                inputs = apply_transform(self._transform, inputs)
            targets = None if targets is None else usable(targets).to(device)
            yield Batch(inputs, targets, torch.arange(start, start + count, device=device))

    def _checked(self) -> Iterator[Pair]:
        """Yield the loader's own batches, to a reader that stops after the last sample.

        Raises:
            FishLegError: one differs from the first pass, or is missing.
        """
        known = enumerate(self._checksums)
        pairs = read_batches(self._loader, self._split)
        for (number, kept), pair in zip(known, pairs, strict=False):
            if checksum(pair) != kept:
                raise FishLegError(
                    f"Calibration samples: batch {number} differs from that of the first pass. A "
                    "fit takes several passes, and each has to see the same samples: read them "
                    "with shuffle=False and without random augmentation, or hold those of one "
                    "pass, `Calibration.from_batches`."
                )
            yield pair
        raise FishLegError(
            f"Calibration samples: expected {len(self)} as in the first pass, but the batches have "
            "ended earlier; hold those of one pass, `Calibration.from_batches`."
        )


def _recut(pairs: Iterator[Pair], skip: int, sizes: list[int]) -> Iterator[Pair]:
    """Yield the samples after the first `skip` in pieces of these sizes, one after the other."""
    waiting: list[Pair] = []
    ready, left = 0, sizes[::-1]
    for pair in pairs:
        here = count_samples(pair[0], "inputs")
        if skip >= here:
            skip -= here
            continue
        waiting.append(take_pair(pair, slice(skip, None)))
        ready, skip = ready + here - skip, 0
        while left and ready >= left[-1]:
            whole, size = join_pairs(waiting), left.pop()
            yield take_pair(whole, slice(size))
            ready -= size
            waiting = [take_pair(whole, slice(size, None))] if ready else []
        if not left:
            return

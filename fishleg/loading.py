"""A loader's batches: inputs and targets separated, and samples joined.

A batch that is a tuple or list of two is (inputs, targets), and one of one is its inputs; a tensor,
an array, a dict or a named tuple is inputs alone. For any other batch a function `split` of the
user's separates inputs and targets.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from fishleg.errors import CapacityExceeded, ShapeMismatch
from fishleg.memory import available_bytes, show_bytes
from fishleg.nests import Nest, as_nest, count_samples, describe, nest_bytes, take, tensors_of

Pair = tuple[Nest, Tensor | None]
"""The inputs of a batch, and its targets if it has any."""
Split = Callable[[Any], tuple[Any, Any]]
"""Tells the inputs of a batch from its targets, which may be None."""

_AT_ONCE = 256  # samples read at once from a data set without a loader
_log = logging.getLogger(__name__)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return (inputs, targets or None) of a batch; see above.

    Raises:
        ShapeMismatch: it is a tuple or list of more than two.
    """
    if not isinstance(batch, tuple | list) or hasattr(batch, "_fields"):
        return batch, None
    if len(batch) > 2:
        raise ShapeMismatch(
            f"expected inputs, or (inputs, targets), got {describe(batch)}, {len(batch)} things; "
            "separate them: `split=lambda batch: (inputs, targets)`."
        )
    return (batch[0], batch[1] if len(batch) == 2 else None) if len(batch) else (batch, None)


def read_batch(batch: Any, split: Split, what: str) -> Pair:
    """Return the inputs and targets of a batch, as tensors.

    Args:
        batch: a loader's.
        split: separates inputs and targets.
        what: its name, for messages.

    Raises:
        ShapeMismatch: it is no nest of samples.
    """
    try:
        given, wanted = split(batch)
    except Exception as error:  # a user's function may raise any type
        own = isinstance(error, ShapeMismatch)
        why = str(error) if own else f"split raised {type(error).__name__}: {error}"
        raise ShapeMismatch(
            f"{what}: {why}"
            + ("" if own else f"; expected (inputs, targets) of {describe(batch)}.")
        ) from error
    inputs = as_nest(given, f"{what}, inputs")
    targets = None if wanted is None else as_nest(wanted, f"{what}, targets")
    if targets is not None and not isinstance(targets, Tensor):
        raise ShapeMismatch(
            f"{what}, targets: expected one tensor, got {describe(targets)}; choose it: "
            "`split=lambda batch: (inputs, targets)`."
        )
    count_samples(inputs if targets is None else (inputs, targets), what)
    return inputs, targets


def check_iterable(batches: Any) -> None:
    """Check that an object is an iterable of batches, and not a batch itself.

    Raises:
        ShapeMismatch: it is not.
    """
    alone = isinstance(batches, Tensor | Mapping | str) or hasattr(batches, "__array__")
    if alone or not isinstance(batches, Iterable | Dataset):
        raise ShapeMismatch(
            f"batches: expected an iterable of batches, such as a DataLoader, got "
            f"{describe(batches)}; a batch by itself goes into a list."
        )


def read_batches(batches: Iterable[Any], split: Split) -> Iterator[Pair]:
    """Yield the inputs and targets of each batch, as tensors.

    Args:
        batches: such as a DataLoader; a data set is read through one.
        split: separates inputs and targets.

    A ShapeMismatch if a batch is no nest of samples, or not like the first one.
    """
    check_iterable(batches)
    if isinstance(batches, Dataset):
        batches = DataLoader(batches, batch_size=_AT_ONCE)
    first: Pair | None = None
    for number, batch in enumerate(batches):
        what = f"batch {number}"
        pair = read_batch(batch, split, what)
        if count_samples(pair[0], what):
            first = first or pair
            _check_alike(first, pair, what)
            yield pair


def hold_batches(
    batches: Iterable[Any],
    split: Split = split_batch,
    *,
    samples: int | None = None,
    memory_bytes: int | None = None,
) -> Pair:
    """Return all samples of an iterable, which is read once.

    Args:
        batches: see `read_batches`.
        split: separates inputs and targets.
        samples: the most samples that are read; None for all.
        memory_bytes: the most that they may take; None for the free memory.

    Raises:
        CapacityExceeded: the samples would take more.
        ShapeMismatch: there is no sample.

    Memory: of the samples, twice that while they are joined. It is forecast from the first
    batch and the number of batches, where that is known.
    """
    held: list[Pair] = []
    count = size = 0
    for inputs, targets in read_batches(batches, split):
        pair = (inputs, targets)
        here = count_samples(inputs, "inputs")
        if samples is not None and here > samples - count:
            pair = take_pair(pair, slice(samples - count))
            here = samples - count
        held.append(pair)
        count, size = count + here, size + _pair_bytes(pair)
        if len(held) == 1:
            room = available_bytes(tensors_of(inputs)[0].device)
            room = room if memory_bytes is None else memory_bytes
            total = int(_forecast(batches, here, samples) * size)
            _log.info("Calibration samples are held: about %s.", show_bytes(total))
        if room is not None and 2 * max(size, total) > room:
            raise CapacityExceeded(
                f"Calibration samples: {count} of them take {show_bytes(size)}, all about "
                f"{show_bytes(max(size, total))}, twice that while they are put together, and "
                f"there are {show_bytes(room)}; take fewer, `samples=`, or read them again in each "
                "pass, `StreamedCalibration`."
            )
        if samples is not None and count >= samples:
            break
    if not held:
        raise ShapeMismatch("Calibration samples: expected at least one, got an empty iterable.")
    return join_pairs(held)


def join_pairs(pairs: list[Pair]) -> Pair:
    """Return the samples of several batches as one."""
    if len(pairs) == 1:
        return pairs[0]
    leaves, specs = zip(*(pytree.tree_flatten(pair) for pair in pairs), strict=True)
    columns = zip(*leaves, strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in columns]
    return pytree.tree_unflatten(joined, specs[0])


def take_pair(pair: Pair, part: slice) -> Pair:
    """Return a run of the samples, as views."""
    inputs, targets = pair
    return take(inputs, part), None if targets is None else targets[part]


def checksum(nest: Any) -> int:
    """Return a number of 64 bits that depends on each byte of a nest's tensors and on its place.

    Memory: three times the largest tensor.
    """
    total = 0
    for leaf in pytree.tree_leaves(nest):
        if leaf is None:
            continue
        raw = leaf.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        padded = torch.nn.functional.pad(raw, (0, -len(raw) % 8))
        words = padded.view(torch.int64)
        # As splitmix64, except that its shifts keep the sign.
        mixed = words + torch.arange(1, len(words) + 1, device=words.device) * _STEP
        mixed = (mixed ^ (mixed >> 30)) * _FIRST
        mixed = (mixed ^ (mixed >> 27)) * _SECOND
        kind = zlib.crc32(repr((leaf.dtype, leaf.shape)).encode())
        total = (total * _STEP + kind + int((mixed ^ (mixed >> 31)).sum())) % 2**64
    return total


_STEP, _FIRST, _SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


def _check_alike(first: Pair, other: Pair, what: str) -> None:
    """Check that two batches differ in their number of samples only.

    Raises:
        ShapeMismatch: they do not.
    """
    one, spec = pytree.tree_flatten(first)
    two, other_spec = pytree.tree_flatten(other)
    alike = spec == other_spec and all(
        (a is None) == (b is None)
        and (a is None or (a.shape[1:], a.dtype) == (b.shape[1:], b.dtype))
        for a, b in zip(one, two, strict=True)
    )
    if not alike:
        raise ShapeMismatch(
            f"{what}: expected samples as in the first batch, {describe(first)}, got "
            f"{describe(other)}; pad them to one length, for instance in the loader's collate_fn."
        )


def _forecast(batches: Iterable[Any], here: int, samples: int | None) -> float:
    """Return the ratio of all samples to the first batch; 1 where it is not known."""
    try:
        count = float(len(batches))  # type: ignore[arg-type] # TypeError where there is none
    except TypeError:
        return 1.0
    if isinstance(batches, Dataset):
        count /= here
    return count if samples is None else min(count, samples / max(here, 1))


def _pair_bytes(pair: Pair) -> int:
    inputs, targets = pair
    return nest_bytes(inputs) + (0 if targets is None else targets.nbytes)

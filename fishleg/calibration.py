"""The samples that curvature is averaged over, and their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.likelihoods import Likelihood, check_targets, given_targets
from fishleg.loading import Split, check_iterable, hold_batches, read_batch, split_batch
from fishleg.nests import (
    Nest,
    as_nest,
    count_samples,
    describe,
    map_tensors,
    take,
    tensors_of,
    usable,
)
from fishleg.options import Labels
from fishleg.rng import SampleGenerator

Transform = Callable[[Nest], Nest]
Augment = Callable[[Nest, int], Nest]
_TRIED = 64  # samples that show whether a transform is random


class Batch(NamedTuple):
    """Samples on the model's device.

    Attributes:
        inputs: as the model takes them, a nest of tensors (n, ...); see `fishleg.nests`.
        targets: (n, ...), if known.
        indices: (n,) int64, the samples' own numbers.
    """

    inputs: Nest
    targets: Tensor | None
    indices: Tensor


class Samples(Protocol):
    """Samples that curvature is averaged over: a `Calibration`, or a `StreamedCalibration`."""

    @property
    def has_targets(self) -> bool:
        """Whether the samples come with targets."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batches(
        self, batch_size: int, device: torch.device, among: slice = slice(None)
    ) -> Iterator[Batch]:
        """Yield the samples in order, the same ones each time; see `Calibration.batches`."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The samples that curvature is averaged over.

    Attributes:
        inputs: (N, ...), any dtype, a tensor or array, or dicts, tuples and lists of them, which
            `Calling` passes to the model. Batches are moved to the model's device. Or an iterable
            of batches such as a DataLoader: see `from_batches`, which has options.
        targets: (N, ...), needed for empirical labels only.
        indices: (N,) int64, the samples' own numbers, which key their labels; default 0 ... N - 1.
        transform: turns a batch of inputs into the model's input, so that uint8 data stay uint8;
            into the same one in each pass, not augmented at random.
        augment: maps inputs, as stored, and a key to other views of the same samples, the same ones
            for the same key. Fits that take a fresh batch in each step use it; others do not.

    Raises:
        ShapeMismatch: there is no sample, the tensors' lengths differ, or a value is no tensor.
    """

    inputs: Nest
    targets: Tensor | None = None
    indices: Tensor | None = None
    transform: Transform | None = None
    augment: Augment | None = None
    _steady: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inputs = self.inputs
        if _is_loader(inputs):
            inputs, targets = hold_batches(inputs)
            object.__setattr__(self, "targets", targets if self.targets is None else self.targets)
        object.__setattr__(self, "inputs", as_nest(inputs, "inputs"))
        try:
            count = len(self)
        except ShapeMismatch as error:
            if not isinstance(inputs, list):
                raise
            raise ShapeMismatch(
                f"{error} A list of batches is taken by `Calibration.from_batches`."
            ) from error
        if count == 0:
            raise ShapeMismatch("inputs: expected at least one sample, got none.")
        for name in ("targets", "indices"):
            if getattr(self, name) is not None:
                tensor = as_nest(getattr(self, name), name)
                if not isinstance(tensor, Tensor):
                    raise ShapeMismatch(
                        f"{name}: expected one tensor, got {type(tensor).__name__}."
                    )
                if len(tensor) != count:
                    raise ShapeMismatch(
                        f"{name}: expected {count} samples as in inputs, got {len(tensor)}."
                    )
                object.__setattr__(self, name, tensor)
        if self.indices is not None and (
            self.indices.ndim != 1
            or self.indices.is_floating_point()
            or self.indices.is_complex()
            or bool((self.indices < 0).any())
        ):
            raise ShapeMismatch(
                f"indices: expected whole numbers from 0 on, one a sample, got "
                f"{describe(self.indices)}."
            )

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[Any],
        *,
        split: Split = split_batch,
        samples: int | None = None,
        transform: Transform | None = None,
        memory_bytes: int | None = None,
    ) -> Calibration:
        """Return the samples of an iterable of batches, which is read once and held in memory.

        Each pass sees the same samples, even if the iterable shuffles or augments, or is a
        generator. `StreamedCalibration` is for samples that do not fit the memory.

        Args:
            batches: such as a DataLoader; or a data set, whose items are (inputs, targets).
            split: maps a batch to its inputs, and its targets or None. By default a tuple or list
                of two is (inputs, targets), and all else inputs alone.
            samples: the number of samples taken, the first ones; None for all.
            transform: see the class.
            memory_bytes: the most that the samples may take; None for the free memory.

        Raises:
            ValueError: `samples` is not positive.

        Other errors, and the memory, are those of `hold_batches`.
        """
        if samples is not None and samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}.")
        inputs, targets = hold_batches(batches, split, samples=samples, memory_bytes=memory_bytes)
        return cls(inputs=inputs, targets=targets, transform=transform)

    def __repr__(self) -> str:
        targets = "with targets" if self.has_targets else "without targets"
        kinds = describe(self.inputs)
        kinds = kinds if len(kinds) <= 80 else f"{len(tensors_of(self.inputs))} tensors"
        return f"Calibration({len(self)} samples, {kinds}, {targets})"

    @property
    def has_targets(self) -> bool:
        """Whether the samples come with targets."""
        return self.targets is not None

    def __len__(self) -> int:
        return count_samples(self.inputs, "inputs")

    def at(self, places: Tensor, key: int | None = None) -> Calibration:
        """Return some of the samples.

        Args:
            places: (n,) int64, their places in this set, from 0.
            key: of `augment`, which is applied where there is a key.
        """
        inputs = map_tensors(lambda leaf: leaf[places.to(leaf.device)], self.inputs)
        if key is not None and self.augment is not None:
            inputs = self.augment(inputs, key)
        indices = places if self.indices is None else self.indices[places]
        targets = None if self.targets is None else self.targets[places]
        chosen = Calibration(
            inputs=inputs, targets=targets, indices=indices, transform=self.transform
        )
        object.__setattr__(chosen, "_steady", self._steady)
        return chosen

    def batches(
        self, batch_size: int, device: torch.device, among: slice = slice(None)
    ) -> Iterator[Batch]:
        """Yield the samples in order, on `device`; the last batch may be smaller.

        Args:
            batch_size: samples in a batch.
            device: where the batches are.
            among: the samples wanted, a run of them; default all.
        """
        if self.transform is not None and not self._steady:
            check_steady(self.transform, take(self.inputs, slice(_TRIED)), device)
            object.__setattr__(self, "_steady", True)
        first, end, _ = among.indices(len(self))
        for start in range(first, end, batch_size):
            part = slice(start, min(start + batch_size, end))
            inputs = self._take(part, device)
            if self.indices is None:
                indices = torch.arange(start, part.stop, device=device)
            else:
                indices = self.indices[part].to(device)
            targets = None if self.targets is None else usable(self.targets[part]).to(device)
            yield Batch(inputs, targets, indices)

    def _take(self, part: slice, device: torch.device) -> Nest:
        """Return the model's inputs for a run of samples."""
        own = self.transform is not None  # a transform may write into its input
        inputs = map_tensors(lambda leaf: leaf.to(device, copy=own), take(self.inputs, part))
        return inputs if self.transform is None else apply_transform(self.transform, inputs)


def _is_loader(value: Any) -> bool:
    """Tell whether a value is an iterable of batches, and neither a nest nor an array."""
    nest = isinstance(value, Tensor | Mapping | tuple | list | str) or hasattr(value, "__array__")
    return not nest and (isinstance(value, Iterable | Dataset))


def inputs_and_targets(batch: Any) -> tuple[Nest, Tensor | None]:
    """Return the inputs of a batch, and its targets if it has any.

    Args:
        batch: a `Batch`, or a loader's; see `fishleg.loading`.

    Raises:
        ShapeMismatch: it has no sample; other errors are those of `read_batch`.
    """
    if isinstance(batch, Batch):
        return batch.inputs, batch.targets
    inputs, targets = read_batch(batch, split_batch, "batch")
    if count_samples(inputs, "batch") == 0:
        raise ShapeMismatch("batch: expected at least one sample, got none.")
    return inputs, targets


def each_batch(batches: Iterable[Any]) -> Iterator[tuple[Nest, Tensor | None]]:
    """Yield the inputs and targets of each batch; see `inputs_and_targets`."""
    check_iterable(batches)
    yield from map(inputs_and_targets, batches)


def apply_transform(transform: Transform, inputs: Nest) -> Nest:
    """Return the transform of a batch.

    Raises:
        ShapeMismatch: it is no nest of as many samples.
        FishLegError: the transform raised an error, which is the cause of this one.
    """
    samples, given = count_samples(inputs, "inputs"), describe(inputs)
    try:
        made = transform(inputs)
    except Exception as error:  # a user's function may raise any type
        raise FishLegError(
            f"transform(inputs) raised {type(error).__name__} for {given}: "
            f"{str(error).rstrip('.')}. It is given a batch of inputs on the model's device."
        ) from error
    found = as_nest(made, "transform(inputs)")
    if count_samples(found, "transform(inputs)") != samples:
        raise ShapeMismatch(
            f"transform(inputs): expected {samples} samples in the first dimension, as in inputs, "
            f"got {describe(found)}."
        )
    return found


def check_steady(transform: Transform, inputs: Nest, device: torch.device) -> None:
    """Check that a transform returns the same for the same samples each time.

    Raises:
        FishLegError: it does not.
    """
    one, two = (
        tensors_of(
            apply_transform(transform, map_tensors(lambda x: x.to(device, copy=True), inputs))
        )
        for _ in range(2)
    )
    for a, b in zip(one, two, strict=True):
        a, b = a.double(), b.double()
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise FishLegError(
                "transform(inputs): expected the same result for the same samples each time, got "
                "another in a second call. A fit takes several passes, and each has to see the "
                "same samples: augment them before, and hold them, `Calibration.from_batches`."
            )


def label(
    outputs: Tensor,
    batch: Batch,
    likelihood: Likelihood,
    *,
    labels: Labels,
    draws: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return D batches of targets and their weights.

    The weights of a sample sum to 1; of enumerated labels at several positions, to their number.

    Args:
        outputs: the model's outputs, (n, ...).
        batch: the samples that they belong to.
        likelihood: the meaning of the outputs.
        labels: "sampled" from the model (D = draws, weights 1/D), "matched" (drawn targets that
            share mean and covariance with the model's labels), "enumerated" (all labels, weighted
            by their probabilities) or "empirical" (D = 1, the data's).
        draws: labels a sample, if sampled or matched.
        seed: of the drawn labels; with a sample's number and the draw it fixes the label.

    Returns:
        targets (D, n, ...) and weights (n, D).

    Raises:
        FishLegError: the likelihood cannot enumerate or match, or the data lack targets that are
            needed, or have ones that the likelihood refuses.
    """
    outputs = outputs.detach()
    if labels == "empirical":
        if batch.targets is None:
            raise FishLegError(
                "Empirical labels need targets; the calibration set has none. Give them, "
                "`Calibration(inputs=..., targets=...)`; of a loader, `from_batches(split=...)` "
                "separates them."
            )
        check_targets(likelihood, outputs, batch.targets)
        return batch.targets[None], outputs.new_ones(len(outputs), 1)
    likelihood = given_targets(likelihood, batch.targets)
    if labels == "enumerated":
        found = getattr(likelihood, "enumerate", lambda outputs: None)(outputs)
        if found is None:
            raise FishLegError(
                f"{type(likelihood).__name__} cannot enumerate its labels; use sampled ones, or "
                "give it a method `enumerate`."
            )
        return found
    draw_targets = getattr(likelihood, "match", None) if labels == "matched" else likelihood.sample
    if draw_targets is None:
        raise FishLegError(
            f"{type(likelihood).__name__} cannot match its labels' moments; use sampled ones, or "
            "give it a method `match`."
        )
    targets = [
        draw_targets(outputs, SampleGenerator(seed, batch.indices, draw)) for draw in range(draws)
    ]
    return torch.stack(targets), outputs.new_full((len(outputs), draws), 1 / draws)

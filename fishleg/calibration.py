"""The samples that curvature is averaged over, and the labels that they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fishleg.errors import FishLegError, ShapeMismatch
from fishleg.likelihoods import Likelihood
from fishleg.rng import SampleGenerator

Labels = Literal["sampled", "matched", "enumerated", "empirical"]
DRAWN: tuple[Labels, ...] = ("sampled", "matched")
"""Kinds of labels of which any number may be drawn a sample."""


class Batch(NamedTuple):
    """Samples on the model's device: inputs as the model takes them, targets if known, numbers."""

    inputs: Tensor
    targets: Tensor | None
    indices: Tensor


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The samples that curvature is averaged over.

    Attributes:
        inputs: (N, ...), any dtype; batches are moved to the model's device.
        targets: (N, ...), needed for empirical labels only.
        indices: (N,) int64, the samples' own numbers, which key their labels; default 0 ... N - 1.
        transform: turns a batch of inputs into the model's input, so that uint8 data stay uint8.

    Raises:
        ShapeMismatch: there is no sample, or the tensors' lengths differ.
    """

    inputs: Tensor
    targets: Tensor | None = None
    indices: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) == 0:
            raise ShapeMismatch("inputs: expected at least one sample, got none.")
        for name, tensor in (("targets", self.targets), ("indices", self.indices)):
            if tensor is not None and len(tensor) != len(self.inputs):
                raise ShapeMismatch(
                    f"{name}: expected {len(self.inputs)} samples as in inputs, got {len(tensor)}."
                )

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(
        self, batch_size: int, device: torch.device, among: slice = slice(None)
    ) -> Iterator[Batch]:
        """Yield the samples in order, on `device`; the last batch may be smaller.

        Args:
            batch_size: samples in a batch.
            device: where the batches are.
            among: the samples wanted, a run of them; default all.
        """
        first, end, _ = among.indices(len(self))
        for start in range(first, end, batch_size):
            part = slice(start, min(start + batch_size, end))
            inputs = self.inputs[part].to(device)
            if self.indices is None:
                indices = torch.arange(start, start + len(inputs), device=device)
            else:
                indices = self.indices[part].to(device)
            yield Batch(
                inputs if self.transform is None else self.transform(inputs),
                None if self.targets is None else self.targets[part].to(device),
                indices,
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
    """Return D batches of targets and their weights, which sum to 1 for each sample.

    Args:
        outputs: the model's outputs, (n, ...).
        batch: the samples that they belong to.
        likelihood: what the outputs mean.
        labels: "sampled" from the model (D = draws, weights 1/D), "matched" (drawn targets that
            share mean and covariance with the model's labels), "enumerated" (all labels, weighted
            by their probabilities) or "empirical" (D = 1, the data's).
        draws: labels a sample, if sampled or matched.
        seed: of the drawn labels; with a sample's number and the draw it fixes the label.

    Returns:
        targets (D, n, ...) and weights (n, D).

    Raises:
        FishLegError: the likelihood cannot enumerate or match, or the data have no targets.
    """
    outputs = outputs.detach()
    if labels == "empirical":
        if batch.targets is None:
            raise FishLegError("Empirical labels need targets; the calibration set has none.")
        return batch.targets[None], outputs.new_ones(len(outputs), 1)
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

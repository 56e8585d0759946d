"""Batches of a calibration set, drawn at random: the same batch for the same step, in every run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fishleg.calibration import Batch, Calibration, Samples
from fishleg.rng import SampleGenerator

_STEP_BITS = 32  # of a seed's key: the lower ones are the seed's, the upper ones the step's


class FreshBatches:
    """Batches of samples, keyed by step.

    A `Calibration` is shuffled again in each round through it, and its `augment` is applied with
    another key in each step. Other samples are read in their own order, round after round.

    Args:
        samples: at least `held_out` + 1 of them.
        size: samples in a batch, >= 1.
        seed: of the order, and of `augment`.
        held_out: samples that no batch contains.
    """

    def __init__(self, samples: Samples, size: int, seed: int, held_out: int = 0):
        self._samples = samples
        self._seed = seed
        self._held_out = held_out
        self._count = len(samples) - held_out
        self.size = min(size, self._count)
        self._reader: Iterator[Batch] = iter(())
        self._next = -1
        self._shuffled: tuple[int | None, torch.Tensor] = (None, torch.empty(0))

    def held_out(self) -> Samples | None:
        """Return the samples that no batch contains, as they are; None where there are none."""
        if not self._held_out:
            return None
        if isinstance(self._samples, Calibration):
            return self._samples.at(self._order(-1)[self._count :])
        first = next(self._samples.batches(self._held_out, _CPU, slice(0, self._held_out)))
        return _as_calibration(first)

    def batch(self, step: int) -> Calibration:
        """Return the batch of a step, >= 0."""
        if not isinstance(self._samples, Calibration):
            return self._read(step)
        chosen = []
        wanted = range(step * self.size, (step + 1) * self.size)
        for epoch in range(wanted.start // self._count, (wanted.stop - 1) // self._count + 1):
            first = epoch * self._count
            part = slice(max(wanted.start - first, 0), min(wanted.stop - first, self._count))
            chosen.append(self._order(epoch)[part])
        return self._samples.at(torch.cat(chosen), key=step_seed(self._seed, step))

    def _order(self, epoch: int) -> torch.Tensor:
        """Return the samples' places in the order of an epoch; of epoch -1, all samples' order."""
        if self._shuffled[0] != epoch:
            places = torch.arange(len(self._samples))
            whole = SampleGenerator(self._seed, places).uniform().argsort()
            if epoch >= 0:
                kept = whole[: self._count]
                draw = SampleGenerator(self._seed, kept, epoch + 1).uniform()
                whole = kept[draw.argsort()]
            self._shuffled = (epoch, whole)
        return self._shuffled[1]

    def _read(self, step: int) -> Calibration:
        """Return the batch of a step from samples that are read in order."""
        each = -(-self._count // self.size)
        if step != self._next:
            skipped = self._held_out + step % each * self.size
            self._reader = self._samples.batches(self.size, _CPU, slice(skipped, None))
        self._next = step + 1
        batch = next(self._reader, None)
        if batch is None:  # a round is complete
            self._reader = self._samples.batches(self.size, _CPU, slice(self._held_out, None))
            batch = next(self._reader)
        return _as_calibration(batch)


_CPU = torch.device("cpu")


def _as_calibration(batch: Batch) -> Calibration:
    return Calibration(inputs=batch.inputs, targets=batch.targets, indices=batch.indices)


def step_seed(seed: int, step: int) -> int:
    """Return a seed of a step's own: the same for the same seed and step.

    Args:
        seed: its lowest 32 bits count.
        step: >= 0.
    """
    return (seed & (1 << _STEP_BITS) - 1) | (step + 1) << _STEP_BITS

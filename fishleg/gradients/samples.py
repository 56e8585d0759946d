"""Calibration samples in batches, with a model's outputs and labels for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from fishleg.calibration import Batch, Samples, label
from fishleg.calling import PLAIN, Calling, model_device
from fishleg.checks import check_integer, check_type
from fishleg.errors import FishLegError
from fishleg.gradients.checks import check_partition
from fishleg.gradients.general_path import GeneralPath
from fishleg.gradients.interaction import check_samples
from fishleg.gradients.rank_group import ALONE, RankGroup
from fishleg.jacobian import Jacobian
from fishleg.likelihoods import Likelihood, check_likelihood
from fishleg.nests import Nest
from fishleg.network import Network, find_network
from fishleg.options import Labels, check_labels
from fishleg.parameters import Partition

_SAMPLES_TO_COMPARE = 16


class LabelledSamples:
    """Reads calibration samples in batches, with a model's outputs and labels for them.

    While a batch is computed the model is in evaluation mode; between batches every module's flag
    is as the caller left it, and the statistics of batch norms never move.

    Arguments and errors are those of `GradientSource`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        partition: Partition,
        calibration: Samples,
        *,
        labels: Labels = "sampled",
        draws: int = 1,
        seed: int = 0,
        batch_size: int = 128,
        calling: Calling = PLAIN,
        rank_group: RankGroup = ALONE,
    ):
        check_type("model", model, nn.Module, "a torch.nn.Module")
        check_type("partition", partition, Partition, "a Partition of partition_parameters")
        check_type("calling", calling, Calling, "a Calling")
        check_type("rank_group", rank_group, RankGroup, "a RankGroup")
        check_likelihood(likelihood)
        for name, value in (("draws", draws), ("seed", seed), ("batch_size", batch_size)):
            check_integer(name, value)
        check_labels(labels, draws)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
        check_partition(model, partition)
        if not hasattr(calibration, "batches"):
            raise FishLegError(
                f"calibration: expected a Calibration, got {type(calibration).__name__}; wrap it, "
                "`Calibration(inputs=...)`."
            )
        self.model = model
        self.likelihood = likelihood
        self.partition = partition
        self.calibration = calibration
        self.labels = labels
        self.draws = draws
        self.seed = seed
        self.batch_size = batch_size
        self.calling = calling
        self.rank_group = rank_group
        self._among = slice(None)
        self._skipped = 0
        self._thorough = False
        self.jacobian = Jacobian()
        self.general = GeneralPath()
        self._seen: list[tuple[int, int]] = []  # versions of the weights that `fast` is for

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {type(self.likelihood).__name__}, "
            f"{len(self.calibration)} samples, labels={self.labels!r})"
        )

    # -- the model

    @cached_property
    def network(self) -> Network:
        """The model as it is computed: in float32 at least, wherever its code permits that."""
        device = model_device(self.model)
        return find_network(
            self.model,
            self.likelihood,
            self.calling,
            lambda: next(self.calibration.batches(1, device)),
        )

    @cached_property
    def singly(self) -> str | None:
        """Why the model is given one sample at a time, or None."""
        batch = next(self._batches(min(_SAMPLES_TO_COMPARE, self.batch_size)))
        return check_samples(self.network, batch)

    def computing(self) -> AbstractContextManager[None]:
        """Put the model in the mode in which curvature is computed; see `Network.computing`."""
        return self.network.computing()

    def outputs(self, batch: Batch) -> Tensor:
        """Return the model's outputs (n, ...) for a batch; errors as of `Calling.outputs`."""
        return self.network.outputs(batch)

    def run(self, parameters: Mapping[str, Tensor], inputs: Nest) -> Tensor:
        """Return the model's outputs with other values of some parameters; raises as the model."""
        return self.network.run(parameters, inputs)

    # -- batches and labels

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield the samples on the model's device, in batches (default: `self.batch_size`).

        One by one where the model decides by their values which operations to run. The inputs are
        prepared for `computing`.
        """
        return self._batches(1 if self.singly is not None else batch_size or self.batch_size)

    def _batches(self, size: int) -> Iterator[Batch]:
        batches = self.calibration.batches(size, model_device(self.model), self._among)
        return map(self.network.prepare, batches)

    def _some_samples(self) -> Batch:
        """Return a few samples, for trials of the model."""
        return next(self.batches(min(_SAMPLES_TO_COMPARE, self.batch_size)))

    def label(
        self, outputs: Tensor, batch: Batch, labels: Labels | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return targets (D, n, ...) and weights (n, D), as `calibration.label` does.

        Args:
            outputs: the model's, (n, ...).
            batch: the samples.
            labels: a kind in place of `self.labels`.
        """
        kind = labels or self.labels
        return label(outputs, batch, self.likelihood, labels=kind, draws=self.draws, seed=self.seed)

    @cached_property
    def rows_per_sample(self) -> int:
        """Rows a sample: labels drawn, or the number of enumerated ones."""
        if self.labels != "enumerated":
            return self.draws
        batch = next(self._batches(1))
        with self.computing(), torch.no_grad():
            return len(self.label(self.outputs(batch), batch)[0])

    @property
    def rows(self) -> int:
        """Rows of one pass: samples times labels."""
        return len(self.calibration) * self.rows_per_sample

    @property
    def rows_at_once(self) -> int:
        """The most rows that are computed at once: `batch_size`, or all where fewer."""
        return min(self.batch_size, self.rows)

    @property
    def samples_at_once(self) -> int:
        """The most samples that are computed at once, >= 1."""
        if self.singly is not None:
            return 1
        return min(max(1, self.batch_size // self.rows_per_sample), len(self.calibration))

    @property
    def longest_part(self) -> int:
        """The most batches that a process of the rank group has in a shared pass."""
        samples = -(-len(self.calibration) // self.rank_group.size)
        return -(-samples // self.samples_at_once) * self._rounds_a_batch

    @property
    def first_row(self) -> int:
        """The number of the first row of a pass among those of all processes."""
        first = (self._among.start or 0) * self.rows_per_sample
        return first + self._skipped * self.batch_size

    @property
    def _rounds_a_batch(self) -> int:
        """The parts that the labels of a batch of samples are cut into, >= 1."""
        return -(-self.samples_at_once * self.rows_per_sample // self.batch_size)

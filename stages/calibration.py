"""Calibration samples of a model, and the per-sample gradients on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg.calibration import Calibration
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Categorical
from fishleg.options import CalibrationOptions
from fishleg.parameters import Partition
from stages.data.batches import augmented
from stages.data.dataset import DataSet
from stages.determinism import generator
from stages.model_folder import Model


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan(CalibrationOptions):
    """The samples of an estimate and the kind of their labels, kept beside it to repeat it.

    See `CalibrationOptions`.
    """

    def indices(self, dataset: DataSet) -> Tensor:
        """Return the calibration samples' numbers in the training split, (n,) int64."""
        return self._order(dataset)[: self.samples]

    def held_out(self, dataset: DataSet, count: int) -> Tensor:
        """Return up to `count` further training samples, disjoint from the calibration samples."""
        return self._order(dataset)[self.samples : self.samples + count]

    def _order(self, dataset: DataSet) -> Tensor:
        draw = generator(self.seed, "calibration")
        return torch.randperm(len(dataset.train), generator=draw)

    def gradients(
        self, model: Model, partition: Partition, dataset: DataSet, indices: Tensor | None = None
    ) -> GradientSource:
        """Return the gradients on some samples, at the weights that the model has in each pass.

        Args:
            model: its network is read again in every pass.
            partition: the network's groups.
            dataset: holds the training split.
            indices: (n,) int64, of training samples, the plan's own by default; they also key the
                labels drawn.
        """
        if indices is None:
            indices = self.indices(dataset)
        chosen = dataset.train.take(indices)

        def augment(inputs: Tensor, key: int) -> Tensor:
            return augmented(dataset, inputs, generator(self.seed, "augmented calibration", key))

        return GradientSource(
            model.network,
            Categorical(),
            partition,
            Calibration(
                inputs=augment(chosen.inputs, -1) if self.augment else chosen.inputs,
                targets=chosen.labels,
                indices=indices,
                transform=dataset.normalise,
                augment=augment if self.augment else None,
            ),
            labels=self.labels,
            draws=self.draws,
            seed=self.seed,
            batch_size=self.batch_size,
        )

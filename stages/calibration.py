"""Calibration samples of a model, and the per-sample gradients on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fishleg.gradients import Calibration, GradientSource
from fishleg.likelihoods import Categorical
from fishleg.parameters import Partition
from stages.data.dataset import DataSet
from stages.determinism import generator
from stages.model_folder import Model

if TYPE_CHECKING:
    from stages.catalogue import CalibrationParams


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """Which samples, and which labels for them; kept beside an estimate, so that it can be remade.

    Attributes:
        samples: number of samples, drawn without replacement from the training split.
        labels: "sampled" from the model, "matched", "enumerated", or "empirical" (the data's).
        draws: labels drawn for each sample, if sampled.
        batch_size: gradient rows computed at once.
        seed: of the choice of samples, and of their labels.
    """

    samples: int
    labels: Literal["sampled", "matched", "enumerated", "empirical"]
    draws: int
    batch_size: int
    seed: int

    @classmethod
    def from_params(cls, params: CalibrationParams) -> CalibrationPlan:
        """Return the plan that a stage's parameters describe."""
        return cls(
            samples=params.samples,
            labels=params.labels,
            draws=params.draws,
            batch_size=params.batch_size,
            seed=params.seed,
        )

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
        """Return the gradients of the model, as it is when they are asked for, on some samples.

        Args:
            model: its network is looked at again in every pass.
            partition: the network's groups.
            dataset: holds the training split.
            indices: (n,) int64, of training samples, the plan's own by default; they also key the
                labels drawn.
        """
        if indices is None:
            indices = self.indices(dataset)
        chosen = dataset.train.take(indices)
        return GradientSource(
            model.network,
            Categorical(),
            partition,
            Calibration(
                inputs=chosen.inputs,
                targets=chosen.labels,
                indices=indices,
                transform=dataset.normalise,
            ),
            labels=self.labels,
            draws=self.draws,
            seed=self.seed,
            batch_size=self.batch_size,
        )

"""The inverse of the Fisher's diagonal."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fishleg.blocks.base import AbstractBlock
from fishleg.blocks.diagonal import DiagonalBlock
from fishleg.estimators.onepass import AbstractOnePassEstimator
from fishleg.gradients import GradientSource
from fishleg.moments import Progress, accumulate, squares


class DiagonalFisher(AbstractOnePassEstimator):
    """Q = diag(1 / (F_ii + damping)): saliency w^2 (F_ii + damping) / 2, and no compensation.

    Cost: one pass over the gradients; one number a parameter.

    Args:
        partition: the groups.
        damping: gamma > 0.
    """

    name = "diagonal"

    def _estimate(
        self, source: GradientSource, masks: Mapping[str, Tensor] | None, progress: Progress
    ) -> dict[str, AbstractBlock]:
        sums = accumulate(source, squares, masks=masks, progress=progress)
        return {
            name: self._cast(source, name, DiagonalBlock(1 / (fisher + self.damping)))
            for name, (fisher,) in sums.items()
        }
